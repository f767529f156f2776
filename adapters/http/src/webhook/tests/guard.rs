//! No way to write an address gets past the guard (F54).

use std::net::Ipv4Addr;

use postrider_actors::model::outcome::Obstacle;

use super::*;

/// One address of each IPv4 block that is not public.
const LOCAL: [&str; 21] = [
    "0.0.0.0",
    "0.1.2.3",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.0.170",
    "192.0.2.1",
    "192.88.99.1",
    "192.88.99.2",
    "192.168.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
];

/// Every way to write an IPv4 address into a URL, and every IPv6 address that leads to it.
fn spellings(address: Ipv4Addr) -> Vec<String> {
    let number = u32::from(address);
    let [a, b, c, d] = address.octets();
    let (high, low) = (number >> 16, number & 0xffff);
    let widened = |sign: char| match sign {
        '.' => '\u{3002}',
        digit => char::from_u32(u32::from(digit) - u32::from('0') + 0xff10).unwrap(),
    };
    let wide: String = address.to_string().chars().map(widened).collect();
    let percent: Vec<_> = address.to_string().bytes().map(|byte| format!("%{byte:02x}")).collect();
    vec![
        address.to_string(),
        format!("{address}."),
        format!("{number}"),
        format!("{number:#x}"),
        format!("0{number:o}"),
        format!("{a:#x}.{b:#X}.{c:#x}.{d:#x}"),
        format!("0{a:o}.0{b:o}.0{c:o}.0{d:o}"),
        format!("{a}.{b}.{low}"),
        format!("{a}.{}", number & 0x00ff_ffff),
        format!("0{a:o}.{b:#x}.{low}"),
        wide,
        percent.concat(),
        format!("someone@{address}"),
        format!("hooks.example.com:443@{address}"),
        format!("[::ffff:{address}]"),
        format!("[0:0:0:0:0:FFFF:{high:x}:{low:x}]"),
        format!("[::{address}]"),
        format!("[64:ff9b::{address}]"),
        format!("[64:ff9b:1::{address}]"),
        format!("[::ffff:0:{address}]"),
        format!("[2002:{high:x}:{low:x}::1]"),
        format!("[2001:0:4136:e378:8000:63bf:{:x}:{:x}]", !high & 0xffff, !low & 0xffff),
    ]
}

/// One address of each IPv6 block that is not public, and ways to write the loopback.
const LOCAL_V6: [&str; 21] = [
    "[::]",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[0000::0001]",
    "[::0.0.0.1]",
    "[64:ff9b:1:ffff::1]",
    "[100::1]",
    "[100:0:0:1::1]",
    "[2001::1]",
    "[2001:1::4]",
    "[2001:2::1]",
    "[2001:1f::1]",
    "[2001:db8::1]",
    "[2002::1]",
    "[3fff:fff::1]",
    "[5f00::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
];

/// What comes of a request to this host; `None` if no such destination can be made.
async fn attempt(host: &str, port: u16) -> Option<Outcome> {
    let url = format!("http://{host}:{port}/hook").parse::<url::Url>().ok()?;
    let keys = WebhookKeys { url: url.into(), ..WebhookKeys::declared() };
    let webhook = HttpWebhook::new(WebhookSettings::new(keys, Vec::new(), &Retry::declared())).ok()?;
    Some(send(&webhook).await)
}

#[tokio::test]
async fn f54_no_spelling_of_any_block_is_connected_to() {
    let server = Server::answering(OK).await;
    let port = server.address.port();
    let v6 = TcpListener::bind(("::1", port)).await.unwrap();
    let addresses = LOCAL.iter().flat_map(|address| spellings(address.parse().unwrap()));
    let v6_hosts = LOCAL_V6.iter().map(|&host| host.to_owned());
    // RFC 6874 and RFC 4007: zones.
    let others = ["localhost", "LOCALHOST", "[fe80::1%25lo]", "[::1%25lo]", "[::1%lo]"];
    let (mut refused, mut impossible) = (0, 0);
    for host in addresses.chain(v6_hosts).chain(others.map(str::to_owned)) {
        match attempt(&host, port).await {
            Some(Outcome::Unsent(Obstacle::Address(_))) => refused += 1,
            None => impossible += 1,
            other => panic!("{host}: {other:?}"),
        }
    }
    // Those with a user are no destination, and those with a zone no URL.
    assert_eq!((refused, impossible), (LOCAL.len() * 20 + LOCAL_V6.len() + 2, LOCAL.len() * 2 + 3));
    assert_eq!(server.connections(), 0);
    assert!(tokio::time::timeout(std::time::Duration::ZERO, v6.accept()).await.is_err(), "0 connections");
    // The listeners do count.
    assert_eq!(send(&server.webhook()).await, SENT);
    assert_eq!(server.connections(), 1);
}

//! Which addresses a request may go to (F54).
//!
//! A destination's name is looked up by a server that may belong to anybody, so its answer may lead into this machine's
//! own network: to a cloud's metadata, a database, the loopback. By default only addresses that the Internet routes are
//! allowed; everything else has to be allowed by its network.

// `core::net` is what `std::net` knows of addresses, without its sockets.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::fmt;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// What a registry says of a block.
struct Block {
    net: IpNet,
    name: &'static str,
    is_global: bool,
}

const fn v4(octets: [u8; 4], prefix: u8, name: &'static str, is_global: bool) -> Block {
    let net = Ipv4Net::new_assert(Ipv4Addr::from_octets(octets), prefix);
    Block { net: IpNet::V4(net), name, is_global }
}

const fn v6(segments: [u16; 8], prefix: u8, name: &'static str, is_global: bool) -> Block {
    let net = Ipv6Net::new_assert(Ipv6Addr::from_segments(segments), prefix);
    Block { net: IpNet::V6(net), name, is_global }
}

const GLOBAL: bool = true;
const LOCAL: bool = false;

/// The IANA IPv4 Special-Purpose Address Registry (RFC 6890, RFC 8190) as of 2025-10-09, and multicast. "N/A" for
/// globally reachable is not "true".
const V4: [Block; 26] = [
    v4([0, 0, 0, 0], 8, "\"This network\"", LOCAL), // RFC 791
    v4([0, 0, 0, 0], 32, "\"This host on this network\"", LOCAL), // RFC 1122
    v4([10, 0, 0, 0], 8, "Private-Use", LOCAL),     // RFC 1918
    v4([100, 64, 0, 0], 10, "Shared Address Space", LOCAL), // RFC 6598
    v4([127, 0, 0, 0], 8, "Loopback", LOCAL),       // RFC 1122
    v4([169, 254, 0, 0], 16, "Link Local", LOCAL),  // RFC 3927
    v4([172, 16, 0, 0], 12, "Private-Use", LOCAL),  // RFC 1918
    v4([192, 0, 0, 0], 24, "IETF Protocol Assignments", LOCAL), // RFC 6890
    v4([192, 0, 0, 0], 29, "IPv4 Service Continuity Prefix", LOCAL), // RFC 7335
    v4([192, 0, 0, 8], 32, "IPv4 dummy address", LOCAL), // RFC 7600
    v4([192, 0, 0, 9], 32, "Port Control Protocol Anycast", GLOBAL), // RFC 7723
    v4([192, 0, 0, 10], 32, "Traversal Using Relays around NAT Anycast", GLOBAL), // RFC 8155
    v4([192, 0, 0, 170], 31, "NAT64/DNS64 Discovery", LOCAL), // RFC 8880, RFC 7050
    v4([192, 0, 2, 0], 24, "Documentation (TEST-NET-1)", LOCAL), // RFC 5737
    v4([192, 31, 196, 0], 24, "AS112-v4", GLOBAL),  // RFC 7535
    v4([192, 52, 193, 0], 24, "AMT", GLOBAL),       // RFC 7450
    v4([192, 88, 99, 0], 24, "Deprecated (6to4 Relay Anycast)", LOCAL), // RFC 7526; 192.88.99.2/32: RFC 6751
    v4([192, 168, 0, 0], 16, "Private-Use", LOCAL), // RFC 1918
    v4([192, 175, 48, 0], 24, "Direct Delegation AS112 Service", GLOBAL), // RFC 7534
    v4([198, 18, 0, 0], 15, "Benchmarking", LOCAL), // RFC 2544
    v4([198, 51, 100, 0], 24, "Documentation (TEST-NET-2)", LOCAL), // RFC 5737
    v4([203, 0, 113, 0], 24, "Documentation (TEST-NET-3)", LOCAL), // RFC 5737
    v4([224, 0, 0, 0], 4, "Multicast", LOCAL),      // RFC 5771
    v4([240, 0, 0, 0], 4, "Reserved", LOCAL),       // RFC 1112
    v4([255, 255, 255, 255], 32, "Limited Broadcast", LOCAL), // RFC 8190, RFC 919
    v4([192, 88, 99, 2], 32, "6a44-relay anycast address", LOCAL), // RFC 6751
];

/// The IANA IPv6 Special-Purpose Address Registry as of 2025-10-09, multicast (RFC 4291), and the rest of the address
/// space, of which only `2000::/3` is given to anybody (IANA Internet Protocol Version 6 Address Space). What holds an IPv4
/// address is judged by that instead: see [`embedded`].
const V6: [Block; 26] = [
    v6([0; 8], 0, "Reserved by IETF", LOCAL),
    v6([0x2000, 0, 0, 0, 0, 0, 0, 0], 3, "Global Unicast", GLOBAL), // RFC 4291
    v6([0; 8], 128, "Unspecified Address", LOCAL),                  // RFC 4291
    v6([0, 0, 0, 0, 0, 0, 0, 1], 128, "Loopback Address", LOCAL),   // RFC 4291
    v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48, "IPv4-IPv6 Translat.", LOCAL), // RFC 8215
    v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64, "Discard-Only Address Block", LOCAL), // RFC 6666
    v6([0x100, 0, 0, 1, 0, 0, 0, 0], 64, "Dummy IPv6 Prefix", LOCAL), // RFC 9780
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23, "IETF Protocol Assignments", LOCAL), // RFC 2928
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32, "TEREDO", LOCAL),         // RFC 4380, RFC 8190
    v6([0x2001, 1, 0, 0, 0, 0, 0, 1], 128, "Port Control Protocol Anycast", GLOBAL), // RFC 7723
    v6([0x2001, 1, 0, 0, 0, 0, 0, 2], 128, "Traversal Using Relays around NAT Anycast", GLOBAL), // RFC 8155
    v6([0x2001, 1, 0, 0, 0, 0, 0, 3], 128, "DNS-SD Service Registration Protocol Anycast", GLOBAL), // RFC 9665
    v6([0x2001, 2, 0, 0, 0, 0, 0, 0], 48, "Benchmarking", LOCAL), // RFC 5180
    v6([0x2001, 3, 0, 0, 0, 0, 0, 0], 32, "AMT", GLOBAL),         // RFC 7450
    v6([0x2001, 4, 0x112, 0, 0, 0, 0, 0], 48, "AS112-v6", GLOBAL), // RFC 7535
    v6([0x2001, 0x10, 0, 0, 0, 0, 0, 0], 28, "Deprecated (previously ORCHID)", LOCAL), // RFC 4843
    v6([0x2001, 0x20, 0, 0, 0, 0, 0, 0], 28, "ORCHIDv2", GLOBAL), // RFC 7343
    v6([0x2001, 0x30, 0, 0, 0, 0, 0, 0], 28, "Drone Remote ID Protocol Entity Tags", GLOBAL), // RFC 9374
    v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32, "Documentation", LOCAL), // RFC 3849
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16, "6to4", LOCAL),         // RFC 3056
    v6([0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0], 48, "Direct Delegation AS112 Service", GLOBAL), // RFC 7534
    v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20, "Documentation", LOCAL), // RFC 9637
    v6([0x5f00, 0, 0, 0, 0, 0, 0, 0], 16, "Segment Routing (SRv6) SIDs", LOCAL), // RFC 9602
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7, "Unique-Local", LOCAL),  // RFC 4193, RFC 8190
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10, "Link-Local Unicast", LOCAL), // RFC 4291
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8, "Multicast", LOCAL),     // RFC 4291
];

/// Blocks whose addresses are another way to write, or to reach, the IPv4 address in their last 32 bits.
const EMBEDDING: [Ipv6Net; 3] = [
    Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96), // IPv4-mapped, RFC 4291
    Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 96), // IPv4-compatible, RFC 4291, deprecated
    Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96), // translated by NAT64, RFC 6052
];

/// The IPv4 address that an IPv6 address holds, if it is one of those that lead to it.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    if address.is_unspecified() || address.is_loopback() {
        return None;
    }
    let [.., a, b, c, d] = address.octets();
    EMBEDDING.iter().any(|net| net.contains(&address)).then(|| Ipv4Addr::new(a, b, c, d))
}

/// An address that is not public, and not allowed either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusedAddress {
    /// As it was found.
    pub address: IpAddr,
    /// What is judged: the address itself, or the IPv4 address in it.
    judged: IpAddr,
    /// What the registry calls its block.
    block: &'static str,
}

impl fmt::Display for RefusedAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, judged, block } = self;
        write!(f, "{address} is not a public address")?;
        if address == judged {
            write!(f, " ({block})")?;
        } else {
            write!(f, " (it leads to {judged}, {block})")?;
        }
        write!(f, "; if it is meant, set allow = [\"{}\"]", IpNet::from(*judged))
    }
}

/// A destination's guard against requests to addresses that nobody meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressGuard {
    allow: Vec<IpNet>,
}

impl AddressGuard {
    /// A guard that lets through what is public, and these networks.
    pub fn new(allow: Vec<IpNet>) -> Self {
        Self { allow }
    }

    /// Whether a connection to `address` may be opened.
    pub fn check(&self, address: IpAddr) -> Result<(), RefusedAddress> {
        let judged = match address {
            IpAddr::V6(v6) => embedded(v6).map_or(address, IpAddr::V4),
            IpAddr::V4(_) => address,
        };
        match local_block(judged) {
            Some(block) if !self.allow.iter().any(|net| net.contains(&judged)) => {
                Err(RefusedAddress { address, judged, block })
            }
            _ => Ok(()),
        }
    }
}

/// The smallest block that `address` is in, unless that is public.
fn local_block(address: IpAddr) -> Option<&'static str> {
    let blocks = V4.iter().chain(&V6).filter(|block| block.net.contains(&address));
    let smallest = blocks.max_by_key(|block| block.net.prefix_len());
    smallest.filter(|block| !block.is_global).map(|block| block.name)
}

/// Whether addresses in `net` are judged by the IPv4 address in them, so that it has to be allowed as IPv4.
pub fn is_embedding(net: &IpNet) -> bool {
    let IpNet::V6(net) = net else { return false };
    EMBEDDING.iter().any(|embedding| embedding.contains(net)) && embedded(net.broadcast()).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both registries as they are printed, and what is not in them; the last column is "Globally Reachable".
    const REGISTRIES: &str = "
        0.0.0.0/8          False
        0.0.0.0/32         False
        10.0.0.0/8         False
        100.64.0.0/10      False
        127.0.0.0/8        False
        169.254.0.0/16     False
        172.16.0.0/12      False
        192.0.0.0/24       False
        192.0.0.0/29       False
        192.0.0.8/32       False
        192.0.0.9/32       True
        192.0.0.10/32      True
        192.0.0.170/32     False
        192.0.0.171/32     False
        192.0.2.0/24       False
        192.31.196.0/24    True
        192.52.193.0/24    True
        192.88.99.0/24     N/A
        192.88.99.2/32     False
        192.168.0.0/16     False
        192.175.48.0/24    True
        198.18.0.0/15      False
        198.51.100.0/24    False
        203.0.113.0/24     False
        224.0.0.0/4        multicast
        240.0.0.0/4        False
        255.255.255.255/32 False
        ::1/128            False
        ::/128             False
        64:ff9b:1::/48     False
        100::/64           False
        100:0:0:1::/64     False
        2001::/23          False
        2001::/32          N/A
        2001:1::1/128      True
        2001:1::2/128      True
        2001:1::3/128      True
        2001:2::/48        False
        2001:3::/32        True
        2001:4:112::/48    True
        2001:10::/28       N/A
        2001:20::/28       True
        2001:30::/28       True
        2001:db8::/32      False
        2002::/16          N/A
        2620:4f:8000::/48  True
        3fff::/20          False
        5f00::/16          False
        fc00::/7           False
        fe80::/10          False
        ff00::/8           multicast
        ::/3               unassigned
        4000::/2           unassigned
        8000::/1           unassigned";

    fn registries() -> Vec<(IpNet, bool)> {
        let line = |line: &str| {
            let (net, reachable) = line.split_once(' ').expect("two columns");
            (net.parse().expect("a block"), reachable.trim() == "True")
        };
        REGISTRIES.lines().map(str::trim).filter(|text| !text.is_empty()).map(line).collect()
    }

    fn is_public(address: IpAddr) -> bool {
        AddressGuard::default().check(address).is_ok()
    }

    /// What the registries say, by their most specific entry.
    fn expected(address: IpAddr) -> bool {
        let blocks = registries().into_iter().filter(|(net, _)| net.contains(&address));
        blocks.max_by_key(|(net, _)| net.prefix_len()).is_none_or(|(_, is_global)| is_global)
    }

    /// The ends of every block, and the addresses beside them.
    fn edges() -> Vec<IpAddr> {
        let edges = registries().into_iter().flat_map(|(net, _)| match net {
            IpNet::V4(net) => {
                let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
                let edges = [first, first.wrapping_sub(1), last, last.wrapping_add(1), first / 2 + last / 2];
                edges.map(|address| IpAddr::from(Ipv4Addr::from(address)))
            }
            IpNet::V6(net) => {
                let (first, last) = (u128::from(net.network()), u128::from(net.broadcast()));
                let edges = [first, first.wrapping_sub(1), last, last.wrapping_add(1), first / 2 + last / 2];
                edges.map(|address| IpAddr::from(Ipv6Addr::from(address)))
            }
        });
        edges.collect()
    }

    fn in_block(segments: [u16; 6], address: Ipv4Addr) -> Ipv6Addr {
        let [a, b, c, d] = address.octets();
        let [high, low] = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])];
        let [s0, s1, s2, s3, s4, s5] = segments;
        Ipv6Addr::new(s0, s1, s2, s3, s4, s5, high, low)
    }

    const MAPPED: [u16; 6] = [0, 0, 0, 0, 0, 0xffff];
    const COMPATIBLE: [u16; 6] = [0; 6];
    const TRANSLATED: [u16; 6] = [0x64, 0xff9b, 0, 0, 0, 0];

    #[test]
    fn f54_every_block_is_judged_as_the_registries_say() {
        let edges = edges();
        assert_eq!(edges.len(), 54 * 5);
        for address in edges {
            let embedded = matches!(address, IpAddr::V6(v6) if embedded(v6).is_some());
            assert!(embedded || is_public(address) == expected(address), "{address}");
        }
        for address in ["1.1.1.1", "8.8.8.8", "172.32.0.0", "2606:4700::1111", "2001:200::1", "2a00::1"] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
        for address in ["169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "fec0::1"] {
            assert!(!is_public(address.parse().unwrap()), "metadata and site-local: {address}");
        }
    }

    #[test]
    fn f54_an_address_within_an_address_is_judged_by_itself() {
        for address in edges() {
            let IpAddr::V4(inner) = address else { continue };
            for segments in [MAPPED, COMPATIBLE, TRANSLATED] {
                let outer = in_block(segments, inner);
                if outer.is_unspecified() || outer.is_loopback() {
                    assert!(!is_public(outer.into()), "{outer}");
                    continue;
                }
                assert_eq!(is_public(outer.into()), expected(address), "{outer}");
            }
            let [a, b, c, d] = inner.octets();
            let [high, low] = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])];
            for outer in [
                Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1), // 6to4
                Ipv6Addr::new(0x2001, 0, 0x4136, 0xe378, 0x8000, 63, !high, !low), // Teredo
                in_block([0x64, 0xff9b, 1, 0, 0, 0], inner),     // NAT64 of the operator's own
                in_block([0, 0, 0, 0, 0xffff, 0], inner),        // IPv4-translated, RFC 2765
            ] {
                assert!(!is_public(outer.into()), "{outer}");
            }
        }
    }

    #[test]
    fn f54_only_what_is_allowed_is_let_through_however_it_is_written() {
        let guard = AddressGuard::new(vec!["10.1.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()]);
        let is_allowed = |text: &str| guard.check(text.parse().unwrap()).is_ok();
        for address in
            ["10.1.0.0", "10.1.255.255", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3", "fd00::1", "1.1.1.1"]
        {
            assert!(is_allowed(address), "{address}");
        }
        for address in ["10.2.0.0", "10.0.255.255", "::ffff:10.2.0.0", "127.0.0.1", "::1", "fd00:0:0:1::1"] {
            assert!(!is_allowed(address), "{address}");
        }
        let everything = AddressGuard::new(vec!["::/0".parse().unwrap()]);
        assert!(everything.check("::1".parse().unwrap()).is_ok());
        assert!(everything.check("::ffff:127.0.0.1".parse().unwrap()).is_err(), "that is an IPv4 address");
    }

    #[test]
    fn f54_a_refusal_says_what_to_write() {
        let refusal =
            |text: &str| AddressGuard::default().check(text.parse().unwrap()).unwrap_err().to_string();
        assert_eq!(
            refusal("10.1.2.3"),
            "10.1.2.3 is not a public address (Private-Use); if it is meant, set allow = [\"10.1.2.3/32\"]"
        );
        assert_eq!(
            refusal("::ffff:127.0.0.1"),
            "::ffff:127.0.0.1 is not a public address (it leads to 127.0.0.1, Loopback); if it is meant, \
             set allow = [\"127.0.0.1/32\"]"
        );
        assert!(refusal("fe80::1").ends_with("set allow = [\"fe80::1/128\"]"));
    }

    #[test]
    fn f54_a_network_that_can_allow_nothing_is_known() {
        let is_embedding = |text: &str| is_embedding(&text.parse().unwrap());
        for net in ["::ffff:10.0.0.0/104", "::10.0.0.0/104", "64:ff9b::/96", "::ffff:0:0/96", "::/96"] {
            assert!(is_embedding(net), "{net}");
        }
        for net in ["10.0.0.0/8", "::/0", "::1/128", "::/128", "fd00::/8", "64:ff9b:1::/48"] {
            assert!(!is_embedding(net), "{net}");
        }
    }
}

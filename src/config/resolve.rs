//! Reads what the configuration only names: secrets, body templates, certificates. The only IO of
//! this module besides reading the file itself, and every failure is reported at once.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use postrider_actors::model::body::BodyTemplate;
use postrider_settings::{join, shown_text};
use rustix::fs::{Access, access};
use secrecy::{ExposeSecret as _, SecretString};

use postrider_http::{
    signature::SigningKey,
    token::{NO_TOKEN, Token},
    webhook,
};
use postrider_net::tls::{Identity, IdentityError};

use super::{
    Config, Header, HeaderValue, HttpAuth, LedgerKind, Ops, Problem, Problems, ReceiptSource, SecretSource,
    SourceKind, TemplateSource, Webhook,
    checks::{shared_secret, unfit_for_events, unfit_template},
    destination::TEMPLATE_BYTES_MAX,
    read_text,
};
use crate::ops::OpsSecrets;

/// The longest secret that is read, in bytes.
const SECRET_BYTES_MAX: u64 = 64 << 10;
/// The largest certificate bundle that is read, in bytes: the whole of Debian's has 220 KiB.
const CA_BYTES_MAX: u64 = 4 << 20;

/// A configuration and everything it names.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The configuration.
    pub config: Config,
    /// What each webhook needs, by its destination's name.
    pub materials: BTreeMap<String, Materials>,
    /// The addresses of databases, with their passwords.
    pub addresses: Addresses,
    /// What senders of receipts prove themselves by, by their source's name.
    pub receipt_secrets: BTreeMap<String, Vec<SecretString>>,
    /// What the ops server shows, and what is to be brought to it.
    pub ops: OpsSecrets,
    /// The headers of requests to the collector of traces, names in lower case.
    pub tracing_headers: Vec<(String, SecretString)>,
}

/// Where databases are. Each is an address as libpq has it, `postgres://USER:PASSWORD@HOST/DATABASE`.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    /// Of the Postgres ledger, if there is one.
    pub ledger: Option<SecretString>,
    /// Of each warehouse, by its name.
    pub warehouses: BTreeMap<String, SecretString>,
}

/// What a destination needs that is not in the configuration itself. Compare two with
/// [`Materials::is_same`] to see whether a reload changes anything.
#[derive(Clone)]
pub struct Materials {
    /// What requests are signed with, in the order of `secrets`.
    pub secrets: Vec<SecretString>,
    /// Static headers, names in lower case.
    pub headers: Vec<(String, SecretString)>,
    /// The body template's source; `None` is the default body.
    pub template: Option<String>,
    /// Certificates in PEM that are trusted beside the system's.
    pub ca_pem: Option<String>,
    /// What is shown to a receiver that asks for a certificate.
    pub client: Option<Client>,
}

/// A client's certificate and key, in PEM, and the same ready for use.
#[derive(Clone)]
pub struct Client {
    certificates: String,
    key: SecretString,
    /// Ready for use.
    pub identity: Identity,
}

impl fmt::Debug for Materials {
    /// Counts and names, never a value (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.headers.iter().map(|(name, _)| name).collect();
        f.debug_struct("Materials")
            .field("secrets", &self.secrets.len())
            .field("headers", &names)
            .field("template", &self.template.is_some())
            .field("ca_pem", &self.ca_pem.is_some())
            .field("client", &self.client.is_some())
            .finish()
    }
}

impl Materials {
    /// Whether both would make the same requests.
    pub fn is_same(&self, other: &Self) -> bool {
        let exposed = |materials: &Self| {
            let secrets: Vec<_> =
                materials.secrets.iter().map(|secret| secret.expose_secret().to_owned()).collect();
            let headers: Vec<_> = materials
                .headers
                .iter()
                .map(|(name, value)| (name.clone(), value.expose_secret().to_owned()))
                .collect();
            let client = materials.client.as_ref();
            let client =
                client.map(|client| (client.certificates.clone(), client.key.expose_secret().to_owned()));
            (secrets, headers, client)
        };
        exposed(self) == exposed(other) && self.template == other.template && self.ca_pem == other.ca_pem
    }
}

impl Config {
    /// Reads secrets, templates and certificates from this process's environment and disk.
    pub fn resolve(self) -> Result<Resolved, Problems> {
        self.resolve_with(|name| env::var_os(name))
    }

    /// Reads only the addresses of databases: what commands need.
    pub fn addresses(&self) -> Result<Addresses, Problems> {
        let mut resolver = Resolver { environment: &|name| env::var_os(name), problems: Vec::new() };
        let addresses = resolver.addresses(self);
        Problems::check(&self.file, resolver.problems)?;
        Ok(addresses)
    }

    /// As [`Config::resolve`], with an environment of the caller's.
    pub fn resolve_with(self, environment: impl Fn(&str) -> Option<OsString>) -> Result<Resolved, Problems> {
        let mut resolver = Resolver { environment: &environment, problems: Vec::new() };
        let webhooks = self.destinations.iter().filter_map(|known| Some((&known.name, known.webhook()?)));
        let materials = webhooks
            .map(|(name, webhook)| (name.clone(), resolver.materials(name, webhook)))
            .collect::<BTreeMap<_, _>>();
        resolver.check_templates(&self, &materials);
        resolver.check_command(&self.alarms.events.command);
        let addresses = resolver.addresses(&self);
        let receipt_secrets = resolver.receipt_secrets(&self.receipt_sources);
        let ops = resolver.ops(&self.ops);
        let tracing_headers = resolver.headers("tracing", &self.tracing.headers);
        if let Some(endpoint) = &self.tracing.endpoint {
            resolver.check_head("tracing", endpoint.as_str(), &tracing_headers, postrider_otlp::CONTENT_TYPE);
        }
        Problems::check(&self.file, resolver.problems)?;
        Ok(Resolved { config: self, materials, addresses, receipt_secrets, ops, tracing_headers })
    }
}

struct Resolver<'a> {
    environment: &'a dyn Fn(&str) -> Option<OsString>,
    problems: Vec<Problem>,
}

impl Resolver<'_> {
    fn note(&mut self, key: &str, found: Option<String>, advice: String) {
        self.problems.push(Problem { key: key.to_owned(), origin: None, found, advice });
    }

    fn addresses(&mut self, config: &Config) -> Addresses {
        let mut addresses = Addresses::default();
        if config.ledger.kind == LedgerKind::Postgres {
            addresses.ledger = self.secret("ledger.postgres.url", &config.postgres.url);
        }
        for warehouse in &config.warehouses {
            let key = join(&join("warehouses", &warehouse.name), "url");
            let address = self.secret(&key, &warehouse.url);
            addresses.warehouses.extend(address.map(|address| (warehouse.name.clone(), address)));
        }
        addresses
    }

    fn receipt_secrets(&mut self, sources: &[ReceiptSource]) -> BTreeMap<String, Vec<SecretString>> {
        let (mut all, mut keys) = (BTreeMap::new(), BTreeMap::<_, &str>::new());
        for source in sources {
            let SourceKind::Http(http) = &source.kind else { continue };
            let is_signing = http.auth == HttpAuth::Signature;
            let key = join(&join("receipts.sources", &source.name), "secrets");
            let secrets = self.secrets(&key, &http.secrets, is_signing);
            for secret in &secrets {
                // F55: two names of one key, or two ways to write it, sign alike.
                let Ok(signing) = SigningKey::new(secret) else { continue };
                let mut signature = Vec::new();
                signing.sign(b"", b"", b"", &mut signature);
                if let Some(other) =
                    keys.insert(signature, &source.name).filter(|other| *other != source.name)
                {
                    self.note(&key, None, shared_secret(other));
                }
            }
            all.insert(source.name.clone(), secrets);
        }
        all
    }

    /// Secrets in the order of their list, and for what is to sign, fit for it.
    fn secrets(&mut self, key: &str, sources: &[SecretSource], is_signing: bool) -> Vec<SecretString> {
        let mut secrets = Vec::new();
        for (index, source) in sources.iter().enumerate() {
            let key = format!("{key}[{index}]");
            let Some(secret) = self.secret(&key, source) else {
                continue;
            };
            if is_signing && let Err(error) = SigningKey::new(&secret) {
                self.note(&key, Some(source.to_string()), format!("what is kept there {error}"));
            }
            secrets.push(secret);
        }
        secrets
    }

    fn materials(&mut self, name: &str, destination: &Webhook) -> Materials {
        let section = join("destinations", name);
        let secrets = self.secrets(&join(&section, "secrets"), &destination.secrets, true);
        let mut headers = self.headers(&section, &destination.headers);
        let authorization = self.authorization(&section, destination);
        headers.extend(authorization.map(|value| ("authorization".to_owned(), value)));
        self.check_head(&section, destination.url.as_str(), &headers, &destination.content_type);
        Materials {
            secrets,
            headers,
            template: self.template(&section, destination),
            ca_pem: self.ca_pem(&section, destination),
            client: destination.client_cert_file.as_deref().zip(destination.client_key.as_ref()).and_then(
                |(path, key)| self.client(&section, ("client_cert_file", path), ("client_key", key)),
            ),
        }
    }

    /// The headers of a client, with their values.
    fn headers(&mut self, section: &str, headers: &[Header]) -> Vec<(String, SecretString)> {
        let value = |header: &Header| {
            let value = match &header.value {
                HeaderValue::Literal(text) => SecretString::from(text.clone()),
                HeaderValue::Secret(source) => {
                    self.secret(&join(&join(section, "headers"), &header.name), source)?
                }
            };
            Some((header.name.clone(), value))
        };
        headers.iter().filter_map(value).collect()
    }

    /// What can't be the head of a request.
    fn check_head(
        &mut self,
        section: &str,
        url: &str,
        headers: &[(String, SecretString)],
        content_type: &str,
    ) {
        let exposed: Vec<_> =
            headers.iter().map(|(name, value)| (name.clone(), value.expose_secret().to_owned())).collect();
        for problem in webhook::validate(url, &exposed, content_type) {
            let advice = format!("{}; {}", problem.found, problem.allowed);
            self.note(&format!("{section}.{}", problem.key), None, advice);
        }
    }

    /// The header of `bearer` or `basic`.
    fn authorization(&mut self, section: &str, destination: &Webhook) -> Option<SecretString> {
        if let Some(source) = &destination.bearer {
            let token = self.secret(&join(section, "bearer"), source)?;
            return Some(format!("Bearer {}", token.expose_secret()).into());
        }
        let (key, source) = (join(section, "basic"), destination.basic.as_ref()?);
        let login = self.secret(&key, source)?;
        // RFC 7617, section 2: the user is what comes before the first colon.
        if !login.expose_secret().contains(':') {
            self.note(
                &key,
                Some(source.to_string()),
                "what is kept there has no colon: write USER:PASSWORD".into(),
            );
            return None;
        }
        Some(format!("Basic {}", STANDARD.encode(login.expose_secret())).into())
    }

    /// Tokens that are fit for their purpose, and the server's certificate.
    fn ops(&mut self, ops: &Ops) -> OpsSecrets {
        let mut token = |name: &str, source: Option<&SecretSource>| {
            let (key, source) = (join("ops", name), source?);
            let token = self.secret(&key, source)?;
            if Token::new(&token).is_none() {
                self.note(
                    &key,
                    Some(source.to_string()),
                    format!("what is kept there is not a token: {NO_TOKEN}"),
                );
            }
            Some(token)
        };
        let view = token("view_token", ops.view_token.as_ref());
        let operate = token("operate_token", ops.operate_token.as_ref());
        let is_same = |view: &SecretString| {
            operate.as_ref().is_some_and(|operate| operate.expose_secret() == view.expose_secret())
        };
        if view.as_ref().is_some_and(is_same) {
            let advice = "it is ops.operate_token too: who may only look could give orders";
            self.note("ops.view_token", None, advice.into());
        }
        let files = ops.tls_cert_file.as_deref().zip(ops.tls_key.as_ref());
        let client =
            files.and_then(|(path, key)| self.client("ops", ("tls_cert_file", path), ("tls_key", key)));
        OpsSecrets { view, operate, identity: client.map(|client| client.identity) }
    }

    /// A certificate and its key, each with the name of the key of `section` that says where it is.
    fn client(
        &mut self,
        section: &str,
        (path_name, path): (&str, &Path),
        (key_name, source): (&str, &SecretSource),
    ) -> Option<Client> {
        let (path_key, key_key) = (join(section, path_name), join(section, key_name));
        let certificates = read_text(path, CA_BYTES_MAX);
        let key = self.secret(&key_key, source);
        let found = shown_text(&path.to_string_lossy());
        let certificates =
            certificates.map_err(|advice| self.note(&path_key, Some(found.clone()), advice)).ok()?;
        let key = key?;
        match Identity::from_pem(&certificates, key.expose_secret()) {
            Ok(identity) => Some(Client { certificates, key, identity }),
            Err(IdentityError::Certificates(advice)) => {
                self.note(&path_key, Some(found), advice);
                None
            }
            Err(IdentityError::Key(advice)) => {
                self.note(&key_key, Some(source.to_string()), advice.into());
                None
            }
        }
    }

    fn secret(&mut self, key: &str, source: &SecretSource) -> Option<SecretString> {
        let text = match source {
            SecretSource::Environment(name) => match (self.environment)(name).map(OsString::into_string) {
                Some(Ok(text)) => Ok(text),
                Some(Err(_)) => Err("the variable is not UTF-8".to_owned()),
                None => Err("the variable is not set".to_owned()),
            },
            SecretSource::File(path) => read_text(path, SECRET_BYTES_MAX),
            SecretSource::Credential(name) => match (self.environment)("CREDENTIALS_DIRECTORY") {
                Some(directory) => {
                    let path = PathBuf::from(directory).join(name);
                    read_text(&path, SECRET_BYTES_MAX).map_err(|error| format!("{}: {error}", path.display()))
                }
                None => Err(format!(
                    "CREDENTIALS_DIRECTORY is not set: run under systemd with LoadCredential={name}:/PATH"
                )),
            },
        };
        // An editor's newline is no part of a secret.
        let text = text.map(|text| text.trim_end_matches(['\r', '\n']).to_owned());
        match text {
            Ok(text) if text.is_empty() => {
                self.note(key, Some(source.to_string()), "there is nothing in it".into());
                None
            }
            Ok(text) => Some(text.into()),
            Err(advice) => {
                self.note(key, Some(source.to_string()), advice);
                None
            }
        }
    }

    fn template(&mut self, section: &str, destination: &Webhook) -> Option<String> {
        let path = match &destination.template {
            TemplateSource::Default => return None,
            TemplateSource::Inline(source) => return Some(source.clone()),
            TemplateSource::File(path) => path,
        };
        let source = read_text(path, TEMPLATE_BYTES_MAX as u64).and_then(|source| {
            BodyTemplate::compile(Some(&source), &destination.content_type)
                .map_err(|error| format!("it is not a valid template: {error}"))?;
            Ok(source)
        });
        source
            .map_err(|advice| {
                self.note(&join(section, "template_file"), Some(shown_text(&path.to_string_lossy())), advice);
            })
            .ok()
    }

    /// Renders every template that was read for each feed that it is used for: see [`unfit_template`].
    fn check_templates(&mut self, config: &Config, materials: &BTreeMap<String, Materials>) {
        for (feed, destination, webhook) in config.uses_of_webhooks() {
            let source = materials.get(&destination.name).and_then(|materials| materials.template.as_deref());
            if let (TemplateSource::File(_), Some(source)) = (&webhook.template, source)
                && let Some(why) = unfit_template(feed, source, webhook)
            {
                self.note(&join(&join("destinations", &destination.name), "template_file"), None, why);
            }
        }
        let of_events = config.alarms.events.events_to.as_deref().and_then(|name| config.destination(name));
        if let Some(destination) = of_events
            && let Some(webhook) = destination.webhook()
            && let TemplateSource::File(_) = &webhook.template
            && let Some(source) = materials.get(&destination.name).and_then(|known| known.template.as_deref())
            && let Some(why) = unfit_for_events(&destination.name, source, webhook)
        {
            self.note(&join(&join("destinations", &destination.name), "template_file"), None, why);
        }
    }

    /// A command that can't be run would be missed when somebody is to be called.
    fn check_command(&mut self, command: &[String]) {
        let Some(program) = command.first() else { return };
        let found = Some(shown_text(program));
        let key = "alarms.command[0]";
        match fs::metadata(program) {
            Err(error) => self.note(key, found, error.to_string()),
            Ok(metadata) if !metadata.is_file() => self.note(key, found, "it is not a file".into()),
            Ok(_) => {
                if let Err(error) = access(program.as_str(), Access::EXEC_OK) {
                    let advice = format!("this user can't run it: {}", io::Error::from(error));
                    self.note(key, found, advice);
                }
            }
        }
    }

    fn ca_pem(&mut self, section: &str, destination: &Webhook) -> Option<String> {
        let path = destination.ca_file.as_deref()?;
        let pem = read_text(path, CA_BYTES_MAX).and_then(|pem| {
            if pem.contains("-----BEGIN CERTIFICATE-----") {
                Ok(pem)
            } else {
                Err("it holds no certificate: write a file in PEM, -----BEGIN CERTIFICATE-----".into())
            }
        });
        pem.map_err(|advice| {
            self.note(&join(section, "ca_file"), Some(shown_text(&path.to_string_lossy())), advice);
        })
        .ok()
    }
}

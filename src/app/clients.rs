//! The clients of webhooks.

use postrider_http::webhook::{HttpWebhook, WebhookKeys, WebhookSettings};
use secrecy::ExposeSecret as _;

use super::error::StartError;
use crate::config::{Destination, Resolved};

/// The client of a destination. It connects to nothing.
pub(super) fn client(
    resolved: &Resolved,
    destination: &Destination,
    keys: WebhookKeys,
) -> Result<HttpWebhook, StartError> {
    let materials = &resolved.materials[&destination.name];
    let headers = materials.headers.iter();
    let headers = headers.map(|(name, value)| (name.clone(), value.expose_secret().to_owned())).collect();
    let settings = WebhookSettings::new(keys, materials.secrets.clone(), &destination.retry);
    let identity = materials.client.as_ref().map(|client| client.identity.clone());
    HttpWebhook::new(WebhookSettings { headers, identity, ..settings }).map_err(|problems| {
        StartError::Destination {
            name: destination.name.clone(),
            problems: problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        }
    })
}

/// A client of its own for events to a destination, and the media type of what its template makes; `None` if it is not a
/// webhook. Nothing is expected of an answer but its status.
pub(super) fn events_client(
    resolved: &Resolved,
    name: &str,
) -> Result<Option<(HttpWebhook, String)>, StartError> {
    let known = resolved.config.destination(name);
    let Some((destination, webhook)) = known.and_then(|known| Some((known, known.webhook()?))) else {
        return Ok(None);
    };
    let keys = WebhookKeys { provider_id: None, results: None, bundle: None, ..webhook.settings.clone() };
    Ok(Some((client(resolved, destination, keys)?, webhook.content_type.clone())))
}

//! From the program's settings to the broker's.

use lapin::uri::SASLMechanism;

use super::{BrokerError, BrokerSettings};
use crate::config::{ConfigError, Settings};

impl BrokerSettings {
    /// # Errors
    /// If nobody said where the broker is.
    pub fn from_settings(settings: &Settings) -> Result<Self, ConfigError> {
        Ok(Self {
            url: settings.broker_url()?.expose().to_owned(),
            ca_file: settings.broker.ca_file.clone(),
            heartbeat: settings.broker.heartbeat,
            connect_timeout: settings.broker.connect_timeout,
            publish_deadline: settings.broker.publish_deadline,
            allow_plaintext: settings.allow_plaintext,
        })
    }

    /// The user that the broker knows us as, which dead letters carry as `user_id`: the one that the URL logs in as. None
    /// where the URL does not say (a certificate does, SASL EXTERNAL), or where no property could hold it.
    pub fn login(&self) -> Option<String> {
        let uri = self.uri().ok()?;
        let elsewhere = [SASLMechanism::External, SASLMechanism::Anonymous];
        let is_in_the_url = !uri.query.auth_mechanism.is_some_and(|one| elsewhere.contains(&one));
        let user = uri.authority.userinfo.username;
        (is_in_the_url && !user.is_empty() && user.len() <= 255).then_some(user)
    }

    /// Reads the URL and the certificate authorities without connecting.
    ///
    /// # Errors
    /// A sentence about the setting that is wrong.
    pub fn check(&self) -> Result<(), BrokerError> {
        self.uri()?;
        self.authorities().map(drop)
    }
}

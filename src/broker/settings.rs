//! From the program's settings to the broker's.

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

    /// Reads the URL and the certificate authorities without connecting.
    ///
    /// # Errors
    /// A sentence about the setting that is wrong.
    pub fn check(&self) -> Result<(), BrokerError> {
        self.uri()?;
        self.authorities().map(drop)
    }
}

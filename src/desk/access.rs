//! Who may ask over HTTP: clients with their enterprises, and tokens.

use std::time::Duration;

use serde::Serialize;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::{Desk, Refusal};
pub use crate::store::{clients::ClientRecord, tokens::TokenRecord};
use crate::{
    domain::digest::sha256,
    store::{
        registry::{By, Registered},
        tokens::{KeptToken, NewToken, Revoked},
    },
};

/// In which role an enterprise asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    Partner,
    Client,
}

impl Role {
    pub const ALL: [Role; 2] = [Role::Partner, Role::Client];

    pub fn as_str(self) -> &'static str {
        match self {
            Role::Partner => "partner",
            Role::Client => "client",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == text)
    }
}

/// How a token begins, so that whoever finds one knows what it is.
const BEGINNING: &str = "stl_";
/// Bytes of chance in a token.
const SECRET: usize = 32;

/// A token as its holder has it: `stl_`, its id, which is no secret, and the secret. Nothing prints it but [`Token::tell`].
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub id: Uuid,
    secret: [u8; SECRET],
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// The system has no chance to give.
    fn make() -> Result<Self, Refusal> {
        let mut secret = [0; SECRET];
        getrandom::fill(&mut secret)
            .map_err(|error| Refusal::ours(format!("the system gives no random bytes: {error}")))?;
        Ok(Self {
            id: Uuid::new_v4(),
            secret,
        })
    }

    /// Reads what a request carries. What has not the form of a token is none, and needs no database to be refused.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.strip_prefix(BEGINNING)?.split_once('_')?;
        // uuid reads other forms as well.
        let is_plain = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if id.len() != 32 || !is_plain(id) || !is_plain(secret) {
            return None;
        }
        let mut bytes = [0; SECRET];
        hex::decode_to_slice(secret, &mut bytes).ok()?;
        Some(Self {
            id: Uuid::try_parse(id).ok()?,
            secret: bytes,
        })
    }

    /// The whole of it. Shown once, to whoever asked for it.
    pub fn tell(&self) -> String {
        format!("{BEGINNING}{}_{}", self.id.simple(), hex::encode(self.secret))
    }

    /// What is kept of it.
    pub fn digest(&self) -> [u8; 32] {
        sha256(self.secret)
    }
}

/// A token to be made.
#[derive(Clone, Debug)]
pub struct TokenWish {
    pub enterprise_id: String,
    pub role: Role,
    pub name: String,
    /// Requests a second; none: as `api.rate_per_token` says.
    pub rate: Option<i32>,
    /// None: as `api.token_lifetime` says.
    pub lasts: Option<Duration>,
}

/// A token that was made: with the token itself, which is told this once.
#[derive(Serialize)]
pub struct TokenMade {
    #[serde(flatten)]
    pub record: TokenRecord,
    pub token: String,
}

/// Who asks, once the token is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenHolder {
    pub token: Uuid,
    pub enterprise_id: String,
    pub role: Role,
    pub rate: Option<i32>,
}

/// What came of registering a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientAdded {
    Added(ClientRecord),
    Exists(ClientRecord),
}

impl Desk {
    /// Registers a client's enterprise.
    ///
    /// # Errors
    /// It is registered with another one; the database is away.
    pub async fn add_client(&self, client: Uuid, enterprise_id: &str, by: By<'_>) -> Result<ClientAdded, Refusal> {
        let added = self
            .patiently(async || self.store.add_client(client, enterprise_id, by).await)
            .await?;
        match added {
            Registered::Added(record) => Ok(ClientAdded::Added(record)),
            Registered::Exists(record) => Ok(ClientAdded::Exists(record)),
            Registered::Conflict(stored) => Err(Refusal::refused(format!(
                "client {client} is registered as one of {}; nothing was changed",
                stored.enterprise_id
            ))
            .hint("no command changes a client's enterprise: what the one was told must not become the other's")),
            Registered::Updated(_)
            | Registered::Revoked(_)
            | Registered::NoPartner
            | Registered::NeverValid
            | Registered::Unproven(_) => Err(Refusal::ours("a client was registered as no client can be")),
        }
    }

    /// Every client, or those of one enterprise.
    ///
    /// # Errors
    /// The database is away.
    pub async fn clients(&self, enterprise_id: Option<&str>) -> Result<Vec<ClientRecord>, Refusal> {
        Ok(self.store.clients(enterprise_id).await?)
    }

    /// Makes a token. It is told here, and never again.
    ///
    /// # Errors
    /// Its enterprise is not known in this role; the database is away.
    pub async fn add_token(&self, wish: &TokenWish, by: By<'_>) -> Result<TokenMade, Refusal> {
        let token = Token::make()?;
        let lasts = wish.lasts.unwrap_or(self.settings.api.token_lifetime);
        let new = NewToken {
            id: token.id,
            enterprise_id: &wish.enterprise_id,
            role: wish.role.as_str(),
            digest: token.digest(),
            name: &wish.name,
            rate: wish.rate,
            lasts_ms: i64::try_from(lasts.as_millis()).unwrap_or(i64::MAX),
        };
        // Once: a second try could leave a token behind that nobody was told.
        match self.store.add_token(&new, by).await? {
            KeptToken::Added(record) => Ok(TokenMade {
                record,
                token: token.tell(),
            }),
            KeptToken::NoSuchEnterprise => {
                let enterprise_id = &wish.enterprise_id;
                Err(match wish.role {
                    Role::Partner => Refusal::refused(format!("no partner {enterprise_id} is registered"))
                        .hint("`settled partner list` shows who is; `settled partner add` registers one"),
                    Role::Client => Refusal::refused(format!("no client of {enterprise_id} is registered"))
                        .hint("`settled client list` shows who is; `settled client add` registers one"),
                })
            }
        }
    }

    /// Accepts a token no more, from the next request on. Says whether it was accepted until now.
    ///
    /// # Errors
    /// There is no such token; the database is away.
    pub async fn revoke_token(&self, id: Uuid, by: By<'_>) -> Result<(TokenRecord, bool), Refusal> {
        let revoked = self.patiently(async || self.store.revoke_token(id, by).await).await?;
        match revoked {
            Some(Revoked::Revoked(record)) => Ok((record, true)),
            Some(Revoked::Before(record)) => Ok((record, false)),
            None => {
                Err(Refusal::refused(format!("there is no token {id}")).hint("`settled token list` shows every one"))
            }
        }
    }

    /// Ids and digests of the tokens that count now: the newest, and so many at most.
    ///
    /// # Errors
    /// The database is away.
    pub async fn valid_tokens(&self, most: usize) -> Result<Vec<(Uuid, [u8; 32])>, Refusal> {
        let found = self.store.valid_tokens(i64::try_from(most).unwrap_or(i64::MAX)).await?;
        let kept = |(id, digest): (Uuid, Vec<u8>)| Some((id, <[u8; 32]>::try_from(digest).ok()?));
        Ok(found.into_iter().filter_map(kept).collect())
    }

    /// Every token, or those of one enterprise, without their secrets, which nobody knows.
    ///
    /// # Errors
    /// The database is away.
    pub async fn tokens(&self, enterprise_id: Option<&str>) -> Result<Vec<TokenRecord>, Refusal> {
        Ok(self.store.tokens(enterprise_id).await?)
    }

    /// Whose token it is; none where it is not one that counts now.
    ///
    /// # Errors
    /// The database is away.
    pub async fn holder(&self, token: &Token) -> Result<Option<TokenHolder>, Refusal> {
        let kept = self.store.token(token.id).await?;
        // The same work for an id that is there and one that is not; and how many bytes agree takes no time to see.
        let (record, digest) = kept.map_or_else(|| (None, vec![0; 32]), |(record, digest)| (Some(record), digest));
        let is_it = bool::from(token.digest().as_slice().ct_eq(&digest));
        Ok(record.filter(|record| is_it && record.valid).and_then(|record| {
            Some(TokenHolder {
                token: record.id,
                role: Role::parse(&record.role)?,
                enterprise_id: record.enterprise_id,
                rate: record.rate,
            })
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_told_and_in_no_other_form() {
        let token = Token::make().expect("chance");
        let text = token.tell();
        assert_eq!(Token::parse(&text), Some(token.clone()));
        assert_ne!(token, Token::make().expect("chance"));
        assert!(!format!("{token:?}").contains(&hex::encode(token.secret)));
        let (head, secret) = text.rsplit_once('_').expect("two parts");
        for other in [
            String::new(),
            head.to_owned(),
            format!("{head}_"),
            format!(" {text}"),
            format!("{text} "),
            text.to_uppercase(),
            text.replace("stl_", "stk_"),
            format!("{head}_{}", &secret[2..]),
            format!("{text}00"),
            format!("{head}_{}", secret.replacen(|_| true, "g", 1)),
            format!("stl_{}_{secret}", token.id),
            format!("stl_{{{}}}_{secret}", token.id),
        ] {
            assert_eq!(Token::parse(&other), None, "{other}");
        }
    }
}

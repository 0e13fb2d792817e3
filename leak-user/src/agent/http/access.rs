//! Who may ask.
//!
//! Without a token only this host can, since the server is then on a loopback address. A page in a browser of this host could try to,
//! by a name of its own that it lets point to 127.0.0.1, so such names are not answered to. With a token whoever has it may ask, by
//! whatever name.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use axum::http::header::{AUTHORIZATION, HOST};
use axum::http::{HeaderMap, Uri};
use subtle::ConstantTimeEq as _;

use crate::agent::config::Mistake;
use crate::agent::files;

/// Characters of a token; fewer could be found by trying.
const LEAST: usize = 16;

/// The secret that clients show. It is never printed.
#[derive(Clone)]
pub struct Token(Arc<[u8]>);

impl Token {
    /// The text of a file, without what is blank around it.
    pub fn read(path: &Path) -> Result<Self, Mistake> {
        let token = files::token(path, LEAST).map_err(|what| Mistake::new("token_file", what))?;
        Ok(Self(token.into_bytes().into()))
    }

    /// Whether the request shows it. How long that takes does not tell how much of it was right.
    pub fn is_shown(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(AUTHORIZATION).map(axum::http::HeaderValue::as_bytes).unwrap_or_default();
        let (scheme, token) = shown.split_at_checked(7).unwrap_or_default();
        scheme.eq_ignore_ascii_case(b"bearer ") && token.trim_ascii().ct_eq(&self.0).into()
    }
}

/// Whether the request is to this host by a name that nobody else can give it.
pub fn is_to_this_host(headers: &HeaderMap, uri: &Uri) -> bool {
    let by_header = headers.get(HOST).and_then(|host| host.to_str().ok());
    // A request line with a whole address stands above the header (RFC 9112, 3.2.2).
    let Some(authority) = uri.authority().map(axum::http::uri::Authority::as_str).or(by_header) else { return false };
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: axum::http::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    /// Only the whole token in the form of RFC 6750 opens.
    #[test]
    fn tokens() {
        let token = Token((*b"0123456789abcdef").into());
        for (shown, opens) in [
            ("Bearer 0123456789abcdef", true),
            ("bearer  0123456789abcdef ", true),
            ("Bearer 0123456789abcde", false),
            ("Bearer 0123456789abcdef0", false),
            ("Bearer ", false),
            ("Bearer", false),
            ("Basic 0123456789abcdef", false),
            ("0123456789abcdef", false),
            ("", false),
        ] {
            assert_eq!(token.is_shown(&headers(AUTHORIZATION, shown)), opens, "{shown:?}");
        }
        assert!(!token.is_shown(&HeaderMap::new()));
    }

    /// Names that others can let point here are not this host's.
    #[test]
    fn hosts() {
        let uri = "/metrics".parse::<Uri>().unwrap();
        for (host, own) in [
            ("localhost", true),
            ("LOCALHOST:9790", true),
            ("127.0.0.1", true),
            ("127.1.2.3:80", true),
            ("[::1]:9790", true),
            ("[::1]", true),
            ("evil.example", false),
            ("evil.example:9790", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("10.0.0.1", false),
            ("0.0.0.0:9790", false),
            ("", false),
            ("localhost:x", false),
        ] {
            assert_eq!(is_to_this_host(&headers(HOST, host), &uri), own, "{host}");
        }
        assert!(!is_to_this_host(&HeaderMap::new(), &uri));
        let absolute = "http://evil.example/metrics".parse::<Uri>().unwrap();
        assert!(!is_to_this_host(&headers(HOST, "localhost"), &absolute));
    }
}

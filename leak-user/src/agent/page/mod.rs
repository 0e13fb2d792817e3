//! The page for people: what leaks, in which line, and how long until memory runs out, readable without any other service.
//!
//! Plain HTML, style and JavaScript modules that are in the binary as they stand here: nothing is built, and nothing is fetched from
//! elsewhere. They hold no data; `page.js` asks for `/api/v1/report` and shows it. Whatever a traced program named comes to the page as
//! text (`dom.js` makes no HTML of strings) and written out where it would not print as itself (`names.js`, as [`crate::view::safe`]).
//! The sentences and numbers are those of the text view; tests/tests/page holds the two together, in a real browser.
//!
//! No framework and no library for charts: a flame graph is boxes with shares of the width, which the browser lays out by itself, and
//! the libraries that draw one bring d3 or React with them.

/// A file of the page by its path in the address, with its content type.
pub fn asset(path: &str) -> Option<(&'static str, &'static [u8])> {
    const SCRIPT: &str = "text/javascript; charset=utf-8";
    let (content_type, text) = match path {
        "/" => ("text/html; charset=utf-8", include_str!("index.html")),
        "/style.css" => ("text/css; charset=utf-8", include_str!("style.css")),
        "/page.js" => (SCRIPT, include_str!("page.js")),
        "/api.js" => (SCRIPT, include_str!("api.js")),
        "/chart.js" => (SCRIPT, include_str!("chart.js")),
        "/dom.js" => (SCRIPT, include_str!("dom.js")),
        "/flame.js" => (SCRIPT, include_str!("flame.js")),
        "/names.js" => (SCRIPT, include_str!("names.js")),
        "/units.js" => (SCRIPT, include_str!("units.js")),
        "/words.js" => (SCRIPT, include_str!("words.js")),
        _ => return None,
    };
    Some((content_type, text.as_bytes()))
}

/// What the page may do, as a header `Content-Security-Policy`: its own scripts and style, and questions to the agent. Not even a string
/// that became HTML could run anything or send anything away.
pub const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                          base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

#[cfg(test)]
mod tests {
    use super::*;

    /// Every file that the page names is there, and it names none elsewhere.
    #[test]
    fn what_is_named_is_served() {
        let mut open = vec!["/".to_owned()];
        let mut seen = Vec::new();
        while let Some(path) = open.pop() {
            if seen.contains(&path) {
                continue;
            }
            let (_, bytes) = asset(&path).unwrap_or_else(|| panic!("{path} is not served"));
            let text = std::str::from_utf8(bytes).unwrap();
            assert!(!text.contains("innerHTML") && !text.contains("eval("), "{path} makes code of strings");
            let addresses = text.match_indices("://").map(|(at, _)| &text[..at]);
            // The name of SVG's elements, which nobody asks for.
            assert!(addresses.clone().all(|before| before.ends_with("\"http")) && addresses.count() <= 1, "{path}");
            for quote in ["from \"./", "href=\"", "src=\""] {
                let names = text.match_indices(quote).map(|(at, _)| &text[at + quote.len()..]);
                let names = names.filter_map(|rest| rest.split('"').next()).filter(|name| !name.starts_with("data:"));
                open.extend(names.map(|name| format!("/{name}")));
            }
            seen.push(path);
        }
        assert_eq!(seen.len(), 10, "{seen:?}");
        assert!(asset("/mod.rs").is_none() && asset("").is_none());
    }
}

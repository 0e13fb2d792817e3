//! Where a value comes from: the file, a variable or a flag, in this order, the later over the earlier; and how a mistake in it is
//! named by that place.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::Deserialize as _;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::{Mistake, Raw, SECTIONS};

/// A larger file is no configuration.
const MAX_FILE: u64 = 1 << 20;
/// What begins each variable's name.
const PREFIX: &str = "LEAKTRACE_";

/// Where a value was given.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    File { path: PathBuf, line: usize },
    Variable(String),
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// What was given, all sources together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Given {
    values: Table,
    /// By the key's whole name, such as `http.listen`.
    origins: BTreeMap<String, Origin>,
}

impl Given {
    /// Takes the file. One that is not there is a mistake only where somebody `named` it.
    pub fn file(&mut self, path: &Path, named: bool) -> Result<(), Refused> {
        let failed = |what: String| Refused(format!("{}: {what}", path.display()));
        let mut text = String::new();
        match std::fs::File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text)) {
            Ok(length) if length as u64 > MAX_FILE => return Err(failed("is larger than 1 MiB".to_owned())),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !named => return Ok(()),
            Err(error) => return Err(failed(format!("cannot be read: {error}"))),
        }
        let line = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
        let at = |error: &toml::de::Error, keys: &[Key]| {
            let what = error.message().trim().replace('\n', ", ");
            let Some(span) = error.span() else { return failed(what) };
            // The innermost key that it is in.
            let key = keys.iter().filter(|key| (key.from..=key.to).contains(&span.start)).max_by_key(|key| key.from);
            let name = key.map(|key| format!("{}: ", key.name)).unwrap_or_default();
            Refused(format!("{}:{}: {name}{what}", path.display(), line(span.start)))
        };
        let parsed = DeTable::parse(&text).map_err(|error| at(&error, &[]))?;
        let mut keys = Vec::new();
        collect("", parsed.get_ref(), &mut keys);
        toml::from_str::<Raw>(&text).map_err(|error| at(&error, &keys))?;
        self.values = text.parse().map_err(|error| at(&error, &keys))?;
        for key in keys {
            self.origins.insert(key.name, Origin::File { path: path.to_owned(), line: line(key.from) });
        }
        Ok(())
    }

    /// Takes the variables `LEAKTRACE_SECTION_KEY`.
    pub fn variables(&mut self, variables: impl Iterator<Item = (String, String)>) -> Result<(), Refused> {
        for (name, value) in variables {
            let Some(rest) = name.strip_prefix(PREFIX) else { continue };
            // The innermost section whose name it begins with.
            let section = SECTIONS.iter().filter_map(|section| {
                let key = rest.strip_prefix(&section.to_uppercase().replace('.', "_"))?.strip_prefix('_')?;
                Some((section, key))
            });
            let Some((section, key)) = section.max_by_key(|(section, _)| section.len()) else { continue };
            // Kubernetes tells containers of each service by such variables.
            if key.starts_with("SERVICE_HOST") || key.starts_with("SERVICE_PORT") || key.starts_with("PORT") {
                continue;
            }
            let key = format!("{section}.{}", key.to_lowercase());
            self.set(&key, &value, Origin::Variable(name))?;
        }
        Ok(())
    }

    /// Takes `--set KEY=VALUE`, or a flag that stands for one.
    pub fn flag(&mut self, flag: &str, key: &str, value: &str) -> Result<(), Refused> {
        self.set(key, value, Origin::Flag(flag.to_owned()))
    }

    /// The value is read as TOML where that is of the right type, and as text otherwise.
    fn set(&mut self, key: &str, text: &str, origin: Origin) -> Result<(), Refused> {
        let parsed = format!("x = {text}").parse::<Table>().ok().and_then(|mut table| table.remove("x"));
        let as_text = Value::String(text.to_owned());
        let alone = |value: &Value| {
            let mut table = Table::new();
            put(&mut table, key, value.clone());
            Raw::deserialize(table)
        };
        let fits = parsed.into_iter().chain([as_text.clone()]).find(|value| alone(value).is_ok());
        let value = match (fits, alone(&as_text)) {
            (Some(value), _) => value,
            (None, Err(error)) => {
                let what = error.message().trim().replace('\n', ", ");
                return Err(Refused(format!("{origin}: {key}: {what}")));
            }
            (None, Ok(_)) => as_text,
        };
        put(&mut self.values, key, value);
        self.origins.insert(key.to_owned(), origin);
        Ok(())
    }

    /// All of it as one value.
    pub fn raw(&self) -> Result<Raw, Refused> {
        Raw::deserialize(self.values.clone()).map_err(|error| Refused(error.message().to_owned()))
    }

    /// The mistake with the place where its value was given.
    pub fn refused(&self, mistake: &Mistake) -> Refused {
        match self.origins.get(&mistake.key) {
            Some(origin) => Refused(format!("{origin}: {}: {}", mistake.key, mistake.what)),
            None => Refused(format!("{}: {}", mistake.key, mistake.what)),
        }
    }

    /// The keys that have another value in `new`.
    pub fn differences(&self, new: &Self) -> Vec<String> {
        let (mut old, mut now) = (BTreeMap::new(), BTreeMap::new());
        flatten("", &self.values, &mut old);
        flatten("", &new.values, &mut now);
        let mut keys: Vec<String> = old.keys().chain(now.keys()).cloned().collect();
        keys.sort();
        keys.dedup();
        keys.retain(|key| old.get(key) != now.get(key));
        keys
    }
}

/// A key of the file, and the bytes that it and its value take.
struct Key {
    name: String,
    from: usize,
    to: usize,
}

fn joined(above: &str, key: &str) -> String {
    if above.is_empty() { key.to_owned() } else { format!("{above}.{key}") }
}

fn collect(above: &str, table: &DeTable<'_>, keys: &mut Vec<Key>) {
    for (key, value) in table {
        let name = joined(above, key.get_ref());
        keys.push(Key { name: name.clone(), from: key.span().start, to: value.span().end.max(key.span().end) });
        if let DeValue::Table(table) = value.get_ref() {
            collect(&name, table, keys);
        }
    }
}

fn flatten(above: &str, table: &Table, flat: &mut BTreeMap<String, Value>) {
    for (key, value) in table {
        let name = joined(above, key);
        match value {
            Value::Table(table) => flatten(&name, table, flat),
            _ => drop(flat.insert(name, value.clone())),
        }
    }
}

fn put(table: &mut Table, key: &str, value: Value) {
    let mut table = table;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            table.insert(part.to_owned(), value);
            return;
        }
        let inner = table.entry(part.to_owned()).or_insert_with(|| Value::Table(Table::new()));
        if !inner.is_table() {
            *inner = Value::Table(Table::new());
        }
        let Value::Table(inner) = inner else { return };
        table = inner;
    }
}

/// A configuration that cannot be used: the place, the key and what is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(pub String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

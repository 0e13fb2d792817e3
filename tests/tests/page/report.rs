//! Made-up reports, which are those of the library's own tests.

use std::collections::BTreeMap;

pub use leak_user::report::*;

#[path = "../../../leak-user/src/report/sample.rs"]
#[allow(dead_code, clippy::assigning_clones, reason = "of the library's tests, which show more of them")]
pub mod sample;

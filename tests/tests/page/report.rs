//! Made-up reports, which are those of the library's own tests.

use std::collections::BTreeMap;

pub use leak_user::report::*;

#[path = "../../../leak-user/src/report/sample.rs"]
#[allow(dead_code, reason = "not every report is shown here")]
pub mod sample;

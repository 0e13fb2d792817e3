//! Tests of the whole: hand-made files ([`made`]), real ones compared with another reading of them ([`real`]), and walks of this
//! very process ([`walk`]).

mod elf;
mod made;
mod real;
mod walk;

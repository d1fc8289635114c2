//! The reference against itself through the cases: equal to the bit, except where a definition of its own judges.

use pi0_device::Reference;
use pi0_model::cases::{Format, Module};

pi0_model::module_tests!(Reference, Format::F32);

#[test]
fn names_are_unique_and_found_by_prefix() {
    let all = Module::all();
    for m in &all {
        assert_eq!(Module::named(m.name()), [*m]);
        let before = all.iter().position(|other| other == m).unwrap();
        for part in m.parts() {
            assert!(all[..before].contains(&part), "{} stands before its part {}", m.name(), part.name());
        }
    }
    assert_eq!(Module::named("gemma").len(), 12);
    assert_eq!(Module::named("gemma.expert").len(), 6);
    assert!(Module::named("gem").is_empty() && Module::named("").is_empty());
}

//! The reference against itself through the cases: equal to the bit, except where a definition of its own judges.

use pi0_device::Reference;
use pi0_model::Kind;
use pi0_model::cases::{Format, Module};

pi0_model::module_tests!(Reference, Format::F32);

#[test]
fn names_are_unique_and_found_by_prefix() {
    for kind in Kind::ALL {
        let all = Module::all(kind);
        for m in &all {
            assert_eq!(Module::named(m.name()), [*m]);
            let before = all.iter().position(|other| other == m).unwrap();
            // A part that the network does not have is no part of it.
            for part in m.parts().into_iter().filter(|part| all.contains(part)) {
                assert!(all[..before].contains(&part), "{} stands before its part {}", m.name(), part.name());
            }
        }
    }
    assert_eq!(Kind::ALL.map(|kind| Module::all(kind).len()), [26, 28, 18]);
    assert_eq!(Module::named("answer").len(), 3);
    assert_eq!(Module::named("gemma").len(), 13);
    assert_eq!(Module::named("gemma.expert").len(), 7);
    assert!(Module::named("gem").is_empty() && Module::named("").is_empty());
}

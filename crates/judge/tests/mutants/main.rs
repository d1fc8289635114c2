//! Does the check see what it should? Errors are planted one at a time; each must be caught, and laid at the door of
//! the module that has it.

mod faults;

use pi0_device::Reference;
use pi0_judge::mutated::{Mutated, Plant};
use pi0_model::cases::check::{Checked, Wanted, check_against, culprits, wanted};
use pi0_model::cases::{Format, Module, Setup};
use pi0_model::{Kind, ModelError};

/// The reference, with errors.
type Mutant = Mutated<Reference>;

fn mutant(plants: Vec<Plant>) -> Mutant {
    let mutant = Mutated::watched(Reference);
    mutant.plant(plants);
    mutant
}

/// The small setups that errors are planted in: the first of each network.
struct Bench {
    setup: Setup,
    /// In f32 and in bf16.
    wanted: [Vec<(Module, Result<Wanted, ModelError>)>; 2],
}

impl Bench {
    fn new(kind: Kind) -> Self {
        let setup = Setup::small().unwrap().into_iter().find(|s| s.config().kind == kind).unwrap();
        let wanted = [Format::F32, Format::Bf16].map(|format| {
            Module::all(kind).into_iter().map(|m| (m, wanted(&Reference, m, &setup, format))).collect()
        });
        Self { setup, wanted }
    }

    fn check(&self, mutant: &Mutant, format: Format) -> Vec<Checked> {
        self.check_some(mutant, format, |_| true)
    }

    fn check_some(&self, mutant: &Mutant, format: Format, pick: impl Fn(Module) -> bool) -> Vec<Checked> {
        let one = |(m, want): &(Module, Result<Wanted, ModelError>)| {
            check_against(mutant, want.as_ref(), *m, &self.setup)
        };
        let wanted = &self.wanted[usize::from(format == Format::Bf16)];
        wanted.iter().filter(|(m, _)| pick(*m)).map(one).collect()
    }
}

fn names(modules: &[Module]) -> String {
    modules.iter().map(|m| m.name()).collect::<Vec<_>>().join(", ")
}

#[test]
fn planted_errors_are_laid_at_the_right_door() {
    attribute(&Bench::new(Kind::Pi0), faults::all());
}

#[test]
fn planted_errors_of_pi05_are_laid_at_the_right_door() {
    attribute(&Bench::new(Kind::Pi05), faults::pi05());
}

#[test]
fn planted_errors_of_fast_are_laid_at_the_right_door() {
    attribute(&Bench::new(Kind::Pi0Fast), faults::fast());
}

fn attribute(bench: &Bench, faults: Vec<(&'static str, &'static str, Plant)>) {
    assert!(culprits(&bench.check(&mutant(Vec::new()), Format::F32)).is_empty());
    let mut wrong = Vec::new();
    println!("| planted error | attributed to | relative L2 there | modules that fail | caught in bf16 |");
    println!("| --- | --- | --- | --- | --- |");
    assert!(faults.len() >= 12);
    for (what, module, plant) in faults {
        let mutant = mutant(vec![plant]);
        let results = bench.check(&mutant, Format::F32);
        assert!(mutant.hits() > 0, "{what} was never executed");
        let found = culprits(&results);
        let failed = results.iter().filter(|r| !r.passed()).count();
        let error = results
            .iter()
            .find(|r| r.module.name() == module)
            .and_then(|r| r.worst()?.agreement.clone().ok())
            .map_or("-".into(), |a| format!("{:.1e}", a.relative_l2));
        let coarse = culprits(&bench.check(&mutant, Format::Bf16));
        let coarse = if coarse.is_empty() { "no" } else { "yes" };
        println!("| {what} | {} | {error} | {failed} of {} | {coarse} |", names(&found), results.len());
        if names(&found) != module {
            wrong.push(format!("{what}: blamed {:?} and not {module}", names(&found)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Every operation of the network, one after the other, gives results that are 1 % too large.
#[test]
fn a_wrong_scale_in_any_operation_is_laid_at_the_right_door() {
    scale_each(&Bench::new(Kind::Pi0));
}

#[test]
fn a_wrong_scale_in_any_operation_of_pi05_is_laid_at_the_right_door() {
    scale_each(&Bench::new(Kind::Pi05));
}

#[test]
fn a_wrong_scale_in_any_operation_of_fast_is_laid_at_the_right_door() {
    scale_each(&Bench::new(Kind::Pi0Fast));
}

fn scale_each(bench: &Bench) {
    let sites_of = |m: Module| {
        let right = mutant(Vec::new());
        m.run(&right, &bench.setup).unwrap();
        right.sites()
    };
    let all = Module::all(bench.setup.config().kind);
    let modules: Vec<(Module, Vec<String>)> = all.into_iter().map(|m| (m, sites_of(m))).collect();
    let sites = sites_of(Module::Pi0);
    let mut wrong = Vec::new();
    for site in &sites {
        let mutant = mutant(vec![Plant::ScaleSite(site.clone(), 1.01)]);
        // A module that never runs the operation is not changed by it.
        let runs = |m: Module| modules.iter().any(|(n, sites)| *n == m && sites.contains(site));
        let found = names(&culprits(&bench.check_some(&mutant, Format::F32, runs)));
        // π0-FAST runs all of the last layer, the others its keys and values.
        let c = bench.setup.config();
        let last = if c.kind == Kind::Pi0Fast { usize::MAX } else { c.gemma.depth - 1 };
        let owner = faults::owner(site, last);
        if found != owner {
            wrong.push(format!("{site}: blamed {found:?} and not {owner}"));
        }
    }
    println!("{} operations, {} laid at the wrong door", sites.len(), wrong.len());
    assert!(sites.len() > 80 && wrong.is_empty(), "{}", wrong.join("\n"));
}

//! Compares a dump with the reference and looks for what explains the differences.

use std::collections::BTreeMap;

use pi0_device::{Agreement, Bound, Device, HostTensor, compare};
use pi0_model::cases::Format;
use pi0_model::golden::compare_taps;
use pi0_model::layout::Layout;
use pi0_model::{Checkpoint, Config};

use super::file::Dump;
use super::hypotheses::{self, Hypothesis, Variation};
use super::order::{self, Rank, STEPS, SUFFIX};
use super::reference::Subject;
use super::verdict::{Cause, Tap, Verdict};
use crate::coverage::{self, roadmap};
use crate::results::{CoverageResults, Environment, Line, Share, Workload};
use crate::{Error, Progress, Result};

type Taps = BTreeMap<String, HostTensor>;

/// The end of an inference.
const END: Rank = (STEPS, u32::MAX, u8::MAX);
/// Most mistakes that are looked for in one dump.
const MOST_CAUSES: usize = 6;
/// Mistakes, and pairs of them, that explain a part of a difference and are tried together with each other one.
const MOST_PAIRED: usize = 6;
/// Mistakes that are looked for in one intermediate.
const AT_ONCE: usize = 3;
/// A mistake must take this much of the difference with it, where another difference remains behind it.
const TAKES: f64 = 3.0;
/// What remains of a difference may be the mistake's own doing, where this much of it is gone: a network that is not π0 any more
/// multiplies what rounding leaves.
const GONE: f64 = 30.0;
/// Mistakes whose remaining differences are this close cannot be told apart.
const AS_GOOD: f64 = 1.5;

/// Judges `dump` by the network of `checkpoint` on `device`, which must be exact to f32. `format` is where the
/// implementation rounds, where the dump does not say it; bf16 if nobody does.
pub fn judge<D: Device>(
    device: D,
    checkpoint: &Checkpoint,
    dump: &Dump,
    format: Option<Format>,
    progress: Progress<'_>,
) -> Result<Verdict> {
    let c = &checkpoint.config;
    let format = format.or(dump.format).unwrap_or(Format::Bf16);
    let device_name = device.name();
    Layout::new(c, &dump.batch)?;
    let suffix = dump.taps.keys().any(|name| order::of_tap(name).0 >= SUFFIX);
    let mut subject = Subject::load(device, checkpoint, dump, progress)?;
    let mut notes = Vec::new();
    let noise = noise(dump, subject.steps(), &mut notes);
    match &noise {
        Some(noise) => subject.start_from(noise),
        None if suffix && dump.batch.iter().any(|i| i.noise.is_none()) => {
            let what = "holds intermediates of the denoising steps but neither the starting noise (inputs.noise) nor \
                        step0.v_t and step0.x_next, from which it follows";
            return Err(Error::Results { path: dump.path.clone(), what: what.into() });
        }
        None => {}
    }
    let court = Court { dump, config: c, format };
    let right =
        subject.run(&Variation::default(), if suffix { END } else { (SUFFIX - 1, u32::MAX, u8::MAX) })?;
    let compared = court.compare(&right, None);
    let first = compared.iter().find(|t| !t.passed()).map(|t| t.name.clone());
    let mut search = Search {
        subject: &subject,
        court: &court,
        checkpoint,
        made: Variation::default(),
        rounds: None,
        causes: vec![],
    };
    let unexplained = match &first {
        Some(_) => match search.explain(&compared)? {
            Some(rest) => match search.gone(&compared)? {
                Some(least) => {
                    notes.push(format!(
                        "with the causes made, {rest} still differs, but nowhere by more than 1/{least:.0} of before: the \
                         mistakes multiply what rounding leaves, or there is another, small one"
                    ));
                    None
                }
                None => Some(rest),
            },
            None => None,
        },
        None => {
            search.lean(&right)?;
            None
        }
    };
    let with_causes = match search.causes.is_empty() {
        true => None,
        false => Some(search.compare(&search.made, END, search.rounds)?),
    };
    let place = |name: &str| place(dump, name);
    let taps: Vec<Tap> = compared
        .iter()
        .enumerate()
        .map(|(i, t)| Tap {
            line: t.line(),
            place: place(&t.name),
            explained_l2: with_causes
                .as_ref()
                .and_then(|all| Some(all.get(i)?.agreement.as_ref().ok()?.relative_l2))
                .filter(|x| x.is_finite()),
        })
        .collect();
    let causes = search.causes;
    let model = checkpoint.directory.display().to_string();
    Ok(Verdict {
        passed: first.is_none() && causes.is_empty() && notes.is_empty(),
        dump: dump.path.display().to_string(),
        source: dump.source.clone(),
        format: format.to_string(),
        steps: subject.steps(),
        coverage: placement(dump, &model, device_name, subject.steps()),
        model,
        taps,
        first,
        causes,
        unexplained,
        notes,
    })
}

/// Where the first step really starts, if the dump lets us know, with a note if that is not what went in.
fn noise(dump: &Dump, steps: usize, notes: &mut Vec<String>) -> Option<Vec<f32>> {
    let (x, v) = (dump.taps.get("step0.x_next")?, dump.taps.get("step0.v_t")?);
    if x.data.len() != v.data.len() {
        return None;
    }
    let dt = -1.0 / steps as f32;
    let start: Vec<f32> = x.data.iter().zip(&v.data).map(|(x, v)| x - dt * v).collect();
    let given: Option<Vec<f32>> =
        dump.batch.iter().map(|i| i.noise.clone()).collect::<Option<Vec<_>>>().map(|n| n.concat());
    match given {
        Some(given) if given.len() == start.len() => {
            let off = compare(&start, &given).relative_l2;
            // bf16 steps move the start by a few thousandths; an Euler step of another sign by much more, and that is
            // for the search to find.
            if off > 0.05 && compare(&start, &given).pcc < 0.5 {
                notes.push(
                    "the first step does not start from the noise that went in: the implementation draws its own, or \
                     drew it once and for all"
                        .into(),
                );
                return Some(start);
            }
            None
        }
        _ => Some(start),
    }
}

/// One intermediate against the reference.
struct Compared {
    name: String,
    rank: Rank,
    agreement: std::result::Result<Agreement, String>,
    bound: Bound,
}

impl Compared {
    fn passed(&self) -> bool {
        self.agreement.as_ref().is_ok_and(|a| self.bound.holds(a))
    }

    fn error(&self) -> f64 {
        self.agreement
            .as_ref()
            .map_or(f64::INFINITY, |a| if a.relative_l2.is_nan() { f64::INFINITY } else { a.relative_l2 })
    }

    fn line(&self) -> Line {
        let name = self.name.clone();
        Line::new(&pi0_model::cases::check::Comparison {
            name,
            agreement: self.agreement.clone(),
            bound: self.bound,
        })
    }
}

/// The dump and how it is compared.
struct Court<'a> {
    dump: &'a Dump,
    config: &'a Config,
    format: Format,
}

impl Court<'_> {
    /// Every intermediate of the dump that `want` has, in order. Those that only `want` has do not count. Behind `rounds` the
    /// implementation is known to round to bf16.
    fn compare(&self, want: &Taps, rounds: Option<Rank>) -> Vec<Compared> {
        let mut got = Taps::new();
        let mut wanted = Taps::new();
        for (name, t) in &self.dump.taps {
            if let Some(want) = want.get(name) {
                got.insert(name.clone(), fitted(t, want, self.dump, self.config));
                wanted.insert(name.clone(), want.clone());
            }
        }
        if let Some(mask) = want.get("prefix.pad_mask") {
            wanted.insert("prefix.pad_mask".into(), self.true_mask(mask));
        }
        let mut all: Vec<Compared> = compare_taps(&got, &wanted, &self.dump.batch)
            .into_iter()
            .filter(|(name, a)| self.dump.taps.contains_key(name) && !a.as_ref().is_ok_and(|a| a.count == 0))
            .map(|(name, agreement)| {
                let rank = order::of_tap(&name);
                let format = match self.format {
                    Format::F32 if rounds.is_some_and(|after| rank > after) => Format::Bf16,
                    format => format,
                };
                let bound = tolerance(format, self.config, &name, &wanted[&name].data);
                Compared { rank, name, agreement, bound }
            })
            .collect();
        let unknown = |name: &&String| !want.contains_key(*name);
        if order::of_tap("actions") <= END && want.contains_key("actions") {
            all.extend(self.dump.taps.keys().filter(unknown).map(|name| Compared {
                rank: order::of_tap(name),
                name: name.clone(),
                agreement: Err("is no intermediate of this network; docs/python.md lists them".into()),
                bound: tolerance(self.format, self.config, name, &[]),
            }));
        }
        all.sort_by(|a, b| (a.rank, &a.name).cmp(&(b.rank, &b.name)));
        all
    }

    /// The mask of the rows that mean something, whatever a mistake made of it.
    fn true_mask(&self, of: &HostTensor) -> HostTensor {
        let mut mask = HostTensor::zeros(of.shape.clone());
        let patches = self.config.vision.patches();
        for (b, inputs) in self.dump.batch.iter().enumerate() {
            let row = mask.row_mut(b);
            for (camera, image) in inputs.images.iter().enumerate() {
                row[camera * patches..(camera + 1) * patches].fill(f32::from(u8::from(image.is_some())));
            }
            let text = inputs.images.len() * patches;
            row[text..text + inputs.tokens.len()].fill(1.0);
        }
        mask
    }
}

/// Roundings of its format that each layer of another implementation may be off by: six where it rounds the operands of
/// products and keeps activations in the format, ten where all is f32. A choice, not a law: what another program rounds, and
/// how often, is not known here, and the search looks for mistakes, which are larger.
const LAYER: f64 = 6.0;
const LAYER_F32: f64 = 10.0;

/// How far a right implementation that rounds in `format` may be from the reference.
fn tolerance(format: Format, config: &Config, name: &str, want: &[f32]) -> Bound {
    let layers = (config.vision.num_hidden_layers + config.gemma.depth) as f64;
    let sums = LAYER_F32 * Format::F32.unit();
    // What a branch adds to the residual is small beside what it is made of.
    let branch = if name.ends_with(".attn") || name.ends_with(".mlp") { 1.5 } else { 1.0 };
    let relative_l2 = match format {
        // Times may be added up in f32.
        Format::F32 => (layers * sums).max(1e-4),
        _ => (layers * branch * (LAYER * format.unit() + 2.0 * sums)).clamp(0.02, 0.3),
    };
    let largest = want.iter().fold(0.0f64, |m, &x| m.max(f64::from(x).abs()));
    Bound { pcc: 1.0 - 2.0 * relative_l2 * relative_l2, relative_l2, max_abs: 10.0 * relative_l2 * largest }
}

/// The dump's tensor in the reference's shape, where it is only written otherwise: without the dimension of a batch of
/// one, or of a prefix only the rows that are there.
fn fitted(got: &HostTensor, want: &HostTensor, dump: &Dump, c: &Config) -> HostTensor {
    if got.shape == want.shape {
        return got.clone();
    }
    let squeezed = |t: &HostTensor| t.shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
    if squeezed(got) == squeezed(want) {
        return HostTensor::new(want.shape.clone(), got.data.clone());
    }
    // `[real rows, W]` of one robot: put where they belong.
    if let ([1, rows, width], [robot]) = (&want.shape[..], &dump.batch[..])
        && got.cols() == *width
    {
        let patches = c.vision.patches();
        let cameras = robot.images.iter().enumerate().filter(|(_, i)| i.is_some());
        let images = cameras.flat_map(|(camera, _)| camera * patches..(camera + 1) * patches);
        let text = robot.images.len() * patches;
        let places: Vec<usize> = images.chain(text..text + robot.tokens.len()).collect();
        if places.len() == got.rows() && places.last().is_none_or(|last| last < rows) {
            let mut out = HostTensor::zeros(want.shape.clone());
            for (from, to) in places.into_iter().enumerate() {
                out.row_mut(to).copy_from_slice(got.row(from));
            }
            return out;
        }
    }
    got.clone()
}

struct Search<'s, 'a, D: Device> {
    subject: &'s Subject<'a, D>,
    court: &'s Court<'s>,
    checkpoint: &'s Checkpoint,
    /// The mistakes found so far, made on the reference.
    made: Variation,
    /// Where the first of them shows that rounds.
    rounds: Option<Rank>,
    causes: Vec<Cause>,
}

/// A mistake that was tried.
#[derive(Clone)]
struct Tried {
    hypothesis: Hypothesis,
    /// Relative L2 at the first difference.
    after: f64,
    /// Whether nothing differs there any more.
    fixed: bool,
}

impl<D: Device> Search<'_, '_, D> {
    /// The dump against the reference with `variation` made.
    fn compare(&self, variation: &Variation, until: Rank, rounds: Option<Rank>) -> Result<Vec<Compared>> {
        Ok(self.court.compare(&self.subject.run(variation, until)?, rounds))
    }

    /// What differs with all mistakes made and `hypothesis`, which explains what first differs at `rank`.
    fn rest(&self, hypothesis: &Hypothesis, rank: Rank) -> Result<Option<Difference>> {
        let next = self.made.and(&hypothesis.variation);
        Ok(divergence(&self.compare(&next, END, self.rounds_with(hypothesis, rank))?))
    }

    fn rounds_with(&self, hypothesis: &Hypothesis, rank: Rank) -> Option<Rank> {
        self.rounds.or(hypothesis.variation.rounds().then_some(rank))
    }

    /// How many times smaller every difference that remains has become, at least, if that is all but gone.
    fn gone(&self, compared: &[Compared]) -> Result<Option<f64>> {
        if self.causes.is_empty() {
            return Ok(None);
        }
        let now = self.compare(&self.made, END, self.rounds)?;
        let left = now.iter().filter(|t| !t.passed() && t.agreement.is_ok() && !is_geometry(&t.name));
        let times = left.map(|t| {
            let before = compared.iter().find(|b| b.name == t.name).map_or(0.0, Compared::error);
            before / t.error()
        });
        let least = times.fold(f64::INFINITY, f64::min);
        Ok((least.is_finite() && least >= GONE).then_some(least))
    }

    /// Makes one mistake after the other until nothing differs any more. Gives the first difference that remains.
    fn explain(&mut self, compared: &[Compared]) -> Result<Option<String>> {
        let mut first = divergence(compared);
        while let Some((at, rank, before, passing)) = first {
            if self.causes.len() == MOST_CAUSES {
                return Ok(Some(at));
            }
            let (mut tried, mut halves) = (Vec::new(), Vec::new());
            let list = hypotheses::common(self.checkpoint, self.court.dump)?;
            for hypothesis in list.into_iter().filter(|h| h.from <= rank) {
                let Some((one, earlier)) = self.attempt(hypothesis, &at, rank)? else { continue };
                // One of several that show in the same place leaves what came before right.
                if one.hypothesis.structural && one.after != before && earlier && !one.fixed {
                    halves.push(one.clone());
                }
                if one.fixed || one.after * TAKES < before {
                    tried.push(one);
                }
            }
            // Single weights are many, and too many for pairs: tried where no mistake of the list makes the difference all but
            // vanish, or only one that may as well be of a single weight as of all of a kind.
            let is_other = |t: &&Tried| !hypotheses::OF_WEIGHTS.contains(&t.hypothesis.name.as_str());
            if !tried.iter().filter(is_other).any(|t| t.fixed && t.after * GONE < before) {
                let list = hypotheses::of_weights(self.checkpoint, passing, rank);
                for hypothesis in list.into_iter().filter(|h| h.from <= rank) {
                    let Some((one, _)) = self.attempt(hypothesis, &at, rank)? else { continue };
                    if one.fixed || one.after * TAKES < before {
                        tried.push(one);
                    }
                }
            }
            let (best, after_all) = match pick(tried) {
                Some(best) => {
                    let after_all = self.rest(&best[0].hypothesis, rank)?;
                    (best, after_all)
                }
                None => (Vec::new(), None),
            };
            // What only makes a difference smaller must leave nothing behind, but for another mistake in the same place.
            let (best, after_all) = match best.first() {
                Some(first) if first.fixed || after_all.is_none() => (best, after_all),
                _ => match self.one_of_several(halves, before, &at, rank)? {
                    Some(one) => {
                        let after_all = self.rest(&one.hypothesis, rank)?;
                        (vec![one], after_all)
                    }
                    None => return Ok(Some(at)),
                },
            };
            // Of several that explain the first difference alike, the one that explains most of the rest.
            let (chosen, rest) = self.farthest(best, after_all, rank)?;
            let or = chosen.1;
            self.rounds = self.rounds_with(&chosen.0.hypothesis, rank);
            self.made = self.made.and(&chosen.0.hypothesis.variation);
            self.causes.push(Cause {
                name: chosen.0.hypothesis.name,
                what: chosen.0.hypothesis.what,
                at,
                before,
                after: chosen.0.after,
                or,
                within_tolerance: false,
            });
            first = rest;
        }
        Ok(None)
    }

    /// Makes a mistake beside those found: what it leaves at `at`, and whether what came before is right. Nothing of one that
    /// cannot be made on this network, which explains nothing.
    fn attempt(&self, hypothesis: Hypothesis, at: &str, rank: Rank) -> Result<Option<(Tried, bool)>> {
        let Ok(now) = self.compare(&self.made.and(&hypothesis.variation), rank, self.rounds) else {
            return Ok(None);
        };
        let Some(here) = now.iter().find(|t| t.name == at) else { return Ok(None) };
        let (after, fixed) = (here.error(), here.passed() && first_is_later(&now, rank));
        let earlier = earlier_pass(&now, rank);
        Ok(Some((Tried { hypothesis, after, fixed }, earlier)))
    }

    /// Of two or three mistakes with which together nothing differs at `at` any more, where fewer do not do it: the one that
    /// takes most of the difference with it. Of several such sets the one that leaves least. Threes begin with the pairs that
    /// leave least.
    fn one_of_several(
        &self,
        mut halves: Vec<Tried>,
        before: f64,
        at: &str,
        rank: Rank,
    ) -> Result<Option<Tried>> {
        halves.sort_by(|a, b| a.after.total_cmp(&b.after));
        let firsts = halves.iter().enumerate().take(MOST_PAIRED).filter(|(_, one)| one.after < before);
        // Sets of mistakes by their places in `halves`, and what they leave.
        let mut sets: Vec<(f64, Vec<usize>)> = firsts.map(|(i, one)| (one.after, vec![i])).collect();
        for _ in 1..AT_ONCE {
            let mut best: Option<(f64, usize)> = None;
            let mut larger: Vec<(f64, Vec<usize>)> = Vec::new();
            for (left, set) in &sets {
                let made =
                    set.iter().fold(self.made.clone(), |made, &i| made.and(&halves[i].hypothesis.variation));
                for (j, other) in halves.iter().enumerate().filter(|(j, _)| !set.contains(j)) {
                    let mut all = [&set[..], &[j]].concat();
                    all.sort_unstable();
                    if larger.iter().any(|(_, known)| *known == all) {
                        continue;
                    }
                    let Ok(now) = self.compare(&made.and(&other.hypothesis.variation), rank, self.rounds)
                    else {
                        continue;
                    };
                    let Some(here) = now.iter().find(|t| t.name == at) else { continue };
                    let error = here.error();
                    if here.passed()
                        && first_is_later(&now, rank)
                        && best.is_none_or(|(least, _)| error < least)
                    {
                        best = Some((error, all[0]));
                    }
                    if error < *left && earlier_pass(&now, rank) {
                        larger.push((error, all));
                    }
                }
            }
            if let Some((_, i)) = best {
                return Ok(Some(halves.swap_remove(i)));
            }
            larger.sort_by(|a, b| a.0.total_cmp(&b.0));
            larger.truncate(MOST_PAIRED);
            sets = larger;
        }
        Ok(None)
    }

    /// Of candidates that explain a difference alike, the one with which the next difference comes latest; and those
    /// that cannot be told from it.
    #[allow(clippy::type_complexity)]
    fn farthest(
        &self,
        candidates: Vec<Tried>,
        of_first: Option<Difference>,
        rank: Rank,
    ) -> Result<((Tried, Vec<String>), Option<Difference>)> {
        let mut ranked: Vec<(Tried, Option<Difference>)> = Vec::new();
        for (i, tried) in candidates.into_iter().enumerate() {
            let rest = match i {
                0 => of_first.clone(),
                _ => self.rest(&tried.hypothesis, rank)?,
            };
            ranked.push((tried, rest));
        }
        let reach = |rest: &Option<Difference>| rest.as_ref().map_or(END, |d| d.1);
        let most = ranked.iter().map(|(_, rest)| reach(rest)).max().unwrap_or(END);
        ranked.retain(|(_, rest)| reach(rest) == most);
        let (best, rest) = ranked.remove(0);
        let or = ranked
            .into_iter()
            .map(|(t, _)| t.hypothesis.what)
            .filter(|w| *w != best.hypothesis.what)
            .collect();
        Ok(((best, or), rest))
    }

    /// Everything is within the tolerance; does what little differs lie in the direction of a mistake? Rounding lies in
    /// none.
    fn lean(&mut self, right: &Taps) -> Result<()> {
        let Some((name, got)) = self.last_of(right) else { return Ok(()) };
        let wanted = &right[&name];
        let deviation: Vec<f64> = difference(&got.data, &wanted.data);
        let size = dot(&deviation, &deviation);
        if size == 0.0 || self.court.format == Format::F32 {
            return Ok(());
        }
        let mut found: Vec<(f64, Cause)> = Vec::new();
        let list = hypotheses::common(self.checkpoint, self.court.dump)?;
        for hypothesis in list.into_iter().filter(|h| h.structural) {
            let Ok(taps) = self.subject.run(&hypothesis.variation, END) else { continue };
            let Some(wrong) = taps.get(&name).filter(|t| t.data.len() == wanted.data.len()) else { continue };
            let predicted = difference(&wrong.data, &wanted.data);
            let (along, reach) = (dot(&deviation, &predicted), dot(&predicted, &predicted));
            let alike = along / (size * reach).sqrt();
            // As far as the mistake goes, and mostly in its direction.
            if alike > 0.7 && (0.7..1.4).contains(&(along / reach)) {
                let error = |t: &HostTensor| compare(&got.data, &t.data).relative_l2;
                let cause = Cause {
                    name: hypothesis.name,
                    what: hypothesis.what,
                    at: name.clone(),
                    before: error(wanted),
                    after: error(wrong),
                    or: vec![],
                    within_tolerance: true,
                };
                found.push((alike, cause));
            }
        }
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        self.causes.extend(found.into_iter().next().map(|(_, cause)| cause));
        Ok(())
    }

    /// The last intermediate that the dump has in the reference's shape: what everything before it leads to.
    fn last_of(&self, right: &Taps) -> Option<(String, HostTensor)> {
        let all = self.court.dump.taps.iter().filter(|(name, _)| right.contains_key(*name));
        let (name, t) = all.max_by_key(|(name, _)| order::of_tap(name))?;
        let fitted = fitted(t, &right[name], self.court.dump, self.court.config);
        // Rows of padding mean nothing; what follows the prefix has none.
        (fitted.shape == right[name].shape && order::of_tap(name).0 >= SUFFIX).then(|| (name.clone(), fitted))
    }
}

/// Name, place and size of a difference, and the place of the last intermediate before it that is right.
type Difference = (String, Rank, f64, Option<Rank>);

/// Masks, positions and the steps' times follow from the inputs rather than from the network: they show where to look, and
/// what the network makes of them is what a mistake must explain.
fn is_geometry(name: &str) -> bool {
    ["prefix.pad_mask", "prefix.positions", "suffix.positions", "suffix.attend"].contains(&name)
        || name.starts_with("step") && name.ends_with(".time")
}

fn divergence(compared: &[Compared]) -> Option<Difference> {
    // What is no number of this network is not for a mistake to explain.
    let at = compared.iter().position(|t| !t.passed() && t.agreement.is_ok() && !is_geometry(&t.name))?;
    let first = &compared[at];
    let passing = compared[..at].iter().rev().find(|t| t.passed() && t.rank < first.rank).map(|t| t.rank);
    Some((first.name.clone(), first.rank, first.error(), passing))
}

/// Whether nothing up to `rank` differs any more.
fn first_is_later(now: &[Compared], rank: Rank) -> bool {
    now.iter().all(|t| t.passed() || t.rank > rank || t.agreement.is_err() || is_geometry(&t.name))
}

/// Whether all that comes before `rank` passes.
fn earlier_pass(now: &[Compared], rank: Rank) -> bool {
    now.iter().all(|t| t.passed() || t.rank >= rank || t.agreement.is_err() || is_geometry(&t.name))
}

/// The mistakes that explain best: of those that fix a difference, all that fix it about as well.
fn pick(mut tried: Vec<Tried>) -> Option<Vec<Tried>> {
    tried.sort_by(|a, b| {
        (!a.fixed, a.after).partial_cmp(&(!b.fixed, b.after)).unwrap_or(std::cmp::Ordering::Equal)
    });
    let best = tried.first()?;
    let (fixed, limit) = (best.fixed, AS_GOOD * best.after.max(1e-9));
    tried.retain(|t| t.fixed == fixed && t.after <= limit);
    tried.truncate(8);
    Some(tried)
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Where the operations of a tap's module ran.
fn place(dump: &Dump, tap: &str) -> Option<String> {
    let module = tap.rsplit_once('.').map_or(tap, |(module, _)| module);
    let of = |records: &mut dyn Iterator<Item = &pi0_device::Record>| {
        let (mut device, mut host) = (false, false);
        for r in records {
            *(if r.on_host() { &mut host } else { &mut device }) = true;
        }
        match (device, host) {
            (false, false) => None,
            (true, false) => Some("device"),
            (false, true) => Some("host"),
            (true, true) => Some("device and host"),
        }
    };
    let own = of(&mut dump.records.iter().filter(|r| *r.module == *tap));
    own.or_else(|| of(&mut dump.records.iter().filter(|r| *r.module == *module))).map(String::from)
}

/// Coverage and roadmap of what the dump says ran where.
fn placement(dump: &Dump, model: &str, device: &str, steps: usize) -> Option<CoverageResults> {
    let records = &dump.records;
    if records.is_empty() {
        return None;
    }
    let rows = coverage::rows(records);
    let sum = |f: fn(&Share) -> u64| {
        (rows.iter().map(|r| f(&r.device)).sum::<u64>(), rows.iter().map(|r| f(&r.host)).sum::<u64>())
    };
    let (on_device, on_host) = sum(|s| s.ops);
    let (items, savings) = coverage::fallbacks(records, &[]);
    let total = records.iter().map(|r| r.time.as_secs_f64()).sum();
    let first = dump.batch.first();
    Some(CoverageResults {
        environment: Environment::here(device, dump.source.clone().unwrap_or_default()),
        workload: Workload {
            model: model.into(),
            batch: dump.batch.len(),
            cameras: first.map_or(0, |i| i.images.iter().flatten().count()),
            tokens: first.map_or(0, |i| i.tokens.len()),
            steps,
            runs: 1,
            forced: vec![],
            host: "as the dump says".into(),
        },
        total_seconds: total,
        roadmap: roadmap::roadmap(total, on_device + on_host, on_device, items, &savings),
        transfers: coverage::transfers(records),
        stages: coverage::stages(records),
        verified: None,
        overhead: None,
        rows,
    })
}

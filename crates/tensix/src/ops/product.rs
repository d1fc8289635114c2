//! A product of the matrix unit as work for cores: which core computes which tiles, alone or with others.

use crate::board::{Near, core_address, rectangle_address};
use crate::device::{Key, Tensix};
use crate::dram::Region;
use crate::error::Fault;
use crate::kernels::{Epilogue, Matmul, Sharing, l1};
use crate::layout::Format;
use crate::perf::{self, LinearPlan, LinearTiles, Machine, Spread};
use crate::tensor::{LinearWeight, Tensor};

/// `y = epilogue(x · W (+ bias)) (+ residual)`.
pub(super) struct Product<'a> {
    pub(super) x: &'a Tensor,
    pub(super) w: &'a LinearWeight,
    pub(super) residual: Option<&'a Tensor>,
    pub(super) epilogue: Epilogue,
    /// Parts of the inputs: `y` has the rows of each part's product behind those of the one before.
    pub(super) parts: usize,
    pub(super) y: &'a Tensor,
}

impl Product<'_> {
    /// Columns of the product for one of the result. The two halves of a GEGLU layer are computed side by side, a tile of
    /// each.
    fn per_output(&self) -> usize {
        if self.epilogue == Epilogue::Geglu { 2 } else { 1 }
    }

    fn shape(&self) -> LinearTiles {
        let cols = self.y.tile_cols() * self.per_output();
        let (rows, parts) = (self.y.tile_rows(), self.parts);
        LinearTiles { rows, cols, depth: self.w.depth / parts, parts }
    }

    /// First tile of the weight of a column of the product.
    fn weight_tile(&self, column: usize) -> u32 {
        let n = self.per_output();
        ((column / n + column % n * self.y.tile_cols()) * self.w.depth) as u32
    }

    /// The arguments of the panel whose first tile is at `r`, `c`.
    fn item(&self, k: &Matmul, r: usize, c: usize) -> Vec<u32> {
        let [rows, cols] = [k.rows as usize, k.cols as usize];
        let [panel_rows, panel_cols] = [k.panel_rows as usize, k.panel_cols as usize];
        // Tiles of the panel, block by block, as row and column of the product.
        let blocks = (r..r + panel_rows)
            .step_by(rows)
            .flat_map(move |r| (c..c + panel_cols).step_by(cols).map(move |c| (r, c)));
        let tiles =
            blocks.flat_map(move |(r, c)| (0..rows * cols).map(move |i| (r + i / cols, c + i % cols)));
        let n = self.per_output();
        let shape = self.shape();
        let rows = shape.rows / shape.parts;
        // Where the part's inputs begin.
        let start = r / rows * shape.depth;
        let mut item = vec![self.x.tile(r % rows, start)];
        item.extend((c..c + panel_cols).map(|c| self.weight_tile(c) + start as u32));
        let stored = tiles.clone().filter(|(_, c)| c.is_multiple_of(n));
        item.extend(stored.map(|(r, c)| self.y.tile(r, c / n)));
        if let Some(residual) = self.residual {
            item.extend(tiles.map(|(r, c)| residual.tile(r, c)));
        }
        item
    }

    /// The panels of cores that work alone. Those that share columns of the weight are neighbours.
    fn items(&self, k: &Matmul) -> Vec<Vec<u32>> {
        let shape = self.shape();
        let rows = (0..shape.rows).step_by(k.panel_rows as usize);
        let columns = (0..shape.cols).step_by(k.panel_cols as usize);
        columns.flat_map(|c| rows.clone().map(move |r| (r, c))).map(|(r, c)| self.item(k, r, c)).collect()
    }

    /// The arguments behind `head` of every core where groups share x: each member of a group has neighbouring columns of its
    /// own and is a core near the banks that hold their weights, and all take the group's rows in the same order. The first
    /// core of a group sends.
    fn shared(&self, k: &Matmul, spread: &Spread, near: &Near, head: &[u32]) -> Vec<(usize, Vec<u32>)> {
        let shape = self.shape();
        let Spread { groups, members, grid_rows, .. } = *spread;
        let [panel_rows, panel_cols] = [k.panel_rows as usize, k.panel_cols as usize];
        let columns = near.columns();
        // All rows that the group may take, for a choice of cores, unless one row has enough.
        let (width, height) = (columns.min(members), if members > columns { grid_rows } else { 1 });
        let each = shape.cols / members;
        let block = |member: usize| self.weight_tile(member * each) / self.w.blocks.span;
        let wanted: Vec<_> = (0..members).map(block).collect();
        let mut work = Vec::new();
        for group in 0..groups {
            let first = (0, group * grid_rows);
            let last = (width - 1, first.1 + height - 1);
            let cores = near.choose(first, last, &wanted);
            for (member, core) in cores.into_iter().enumerate() {
                let sends = core == first.1 * columns;
                let sharing = Sharing {
                    sender: core_address(first),
                    receivers: if sends { members as u32 - 1 } else { 0 },
                    rectangle: rectangle_address(first, last),
                    acks: (width * height) as u32 - 1,
                    chunks: shape.depth.div_ceil(k.chunk as usize) as u32,
                };
                let rows = (group * panel_rows..shape.rows).step_by(groups * panel_rows);
                let own = (member * each..(member + 1) * each).step_by(panel_cols);
                let panels = rows.flat_map(|r| own.clone().map(move |c| (r, c)));
                let items: Vec<_> = panels.map(|(r, c)| self.item(k, r, c)).collect();
                let mut args = vec![items.len() as u32];
                args.extend(head);
                args.extend(sharing.words());
                args.extend(items.iter().flatten());
                work.push((core, args));
            }
        }
        work
    }
}

impl Tensix {
    /// How a product is computed: what the model on paper says is fastest.
    pub(super) fn plan(&self, p: &Product<'_>) -> Result<LinearPlan, Fault> {
        let room = self.l1_room();
        let formats = [p.x.format, p.w.format];
        let like = Matmul::smallest(formats, p.w.bias, p.epilogue, p.y.format, self.banks);
        let plan = self.sizes.get((p.shape(), like), |(shape, like)| {
            let machine = Machine::on_grid(self.grid());
            perf::best_linear(&machine, *shape, *like, room, l1::ARG_WORDS - 64).ok_or(Fault::L1Overflow {
                kernel: "a linear layer".into(),
                needed: like.l1_bytes(),
                available: room,
            })
        })?;
        Ok(*plan)
    }

    /// Computes a product in some way. Every way gives the same bits.
    pub(super) fn multiply(&self, p: &Product<'_>, plan: &LinearPlan) -> Result<(), Fault> {
        let constants = self.constants()?;
        let head = [
            p.y.base(),
            p.x.base(),
            p.w.region.base(),
            p.x.pitch as u32,
            p.shape().depth as u32,
            if p.x.format == Format::Bf16 { constants.ones_bf16 } else { constants.ones },
            p.residual.map_or(0, Tensor::base),
            p.w.exponents.as_ref().map_or(0, Region::base),
            p.w.blocks.span,
            p.w.blocks.magic,
        ];
        let k = &plan.kernel;
        match &plan.spread {
            Some(spread) => self.run_on(Key::Matmul(*k), &p.shared(k, spread, self.near(), &head)),
            None => self.run(Key::Matmul(*k), &head, &p.items(k)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use pi0_device::{Dense, Device, LinearPart, TensorSource, WeightSource, dense};

    use super::*;
    use crate::board::Grid;
    use crate::device::TensixOptions;
    use crate::layout::{SHARED, bfp8_value, to_bfp8};
    use crate::tensor::{Weight, WeightKind};

    fn open(grid: Grid, lists: bool) -> Option<Tensix> {
        open_with(TensixOptions { grid: Some(grid), command_lists: Some(lists), ..Default::default() })
    }

    fn open_with(options: TensixOptions) -> Option<Tensix> {
        if std::env::var_os("TT_METAL_SIMULATOR").is_none_or(|v| v.is_empty()) {
            eprintln!("skipped: set TT_METAL_SIMULATOR to Tenstorrent's libttsim.so for Wormhole");
            return None;
        }
        Some(Tensix::open(&options).unwrap())
    }

    fn values(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8e6 - 1.0).collect()
    }

    fn linear(outputs: usize, inputs: usize) -> WeightSource {
        let tensor = |shape: Vec<usize>, seed| {
            TensorSource::from_f32("w", shape.clone(), &values(shape.iter().product(), seed)).unwrap()
        };
        let weight = tensor(vec![outputs, inputs], 1);
        let part = LinearPart { weight, bias: Some(tensor(vec![outputs], 2)), columns: None };
        WeightSource::Linear { parts: vec![part], exact: false }
    }

    /// A layer's operands: 4 rows of tiles, 12 columns, 5 along the inputs and the bias.
    struct Layer {
        x: Tensor,
        weight: Weight,
        residual: Tensor,
    }

    impl Layer {
        fn new(d: &Tensix) -> Self {
            let (rows, inputs, outputs) = (120, 150, 384);
            Layer {
                x: d.upload(rows, inputs, &values(rows * inputs, 3)).unwrap(),
                weight: d.prepare(&linear(outputs, inputs)).unwrap(),
                residual: d.upload(rows, outputs, &values(rows * outputs, 4)).unwrap(),
            }
        }

        /// The layer with some epilogue, in the ways that `choose` picks of all that are possible; of each the bits.
        fn compute(
            &self,
            d: &Tensix,
            epilogue: Epilogue,
            mut choose: impl FnMut(&LinearPlan) -> bool,
        ) -> Vec<(LinearPlan, Vec<f32>)> {
            let WeightKind::Linear(w) = &self.weight.kind else { panic!("not linear") };
            let outputs = if epilogue == Epilogue::Geglu { w.outputs / 2 } else { w.outputs };
            let residual = (epilogue == Epilogue::Residual).then_some(&self.residual);
            let machine = Machine::on_grid(d.grid());
            let y = d.tensor(self.x.rows, outputs).unwrap();
            let p = Product { x: &self.x, w, residual, epilogue, parts: 1, y: &y };
            let like = Matmul::smallest([p.x.format, w.format], w.bias, epilogue, y.format, d.banks);
            let all = perf::candidates(&machine, p.shape(), like, d.l1_room(), l1::ARG_WORDS - 64);
            // Shorter chunks than fit, so that there are many.
            let short = |plan: LinearPlan| {
                let kernel = Matmul { chunk: 2, partial: true, ..plan.kernel };
                [plan, LinearPlan { kernel, ..plan }]
            };
            let chosen: Vec<_> = all.into_iter().flat_map(short).filter(|p| choose(p)).collect();
            let compute = |plan| {
                d.multiply(&p, &plan).unwrap();
                (plan, d.download(&y).unwrap().data)
            };
            chosen.into_iter().map(compute).collect()
        }
    }

    fn alone(plan: &LinearPlan) -> bool {
        plan.spread.is_none() && plan.kernel.panel_rows == 1 && plan.kernel.panel_cols == 2
    }

    /// Groups, rounds, slots and chunks of every kind, on grids where rectangles hold cores that do not take part.
    #[test]
    fn cores_that_share_compute_what_cores_do_alone() {
        let mut want = std::collections::HashMap::new();
        for grid in [(8, 10), (8, 7), (3, 2), (1, 2), (1, 1)] {
            let Some(d) = open(grid, false) else { return };
            let layer = Layer::new(&d);
            for epilogue in [Epilogue::None, Epilogue::Residual, Epilogue::Gelu, Epilogue::Geglu] {
                let mut first = true;
                let bits = layer.compute(&d, epilogue, |p| alone(p) && std::mem::take(&mut first));
                let want = want.entry(epilogue).or_insert_with(|| bits[0].1.clone());
                assert!(bits[0].1 == *want && want.iter().any(|v| *v != 0.0), "{grid:?} {epilogue:?}");
                let mut seen = HashSet::new();
                let shared = layer.compute(&d, epilogue, |p| {
                    let k = &p.kernel;
                    p.spread.is_some_and(|s| {
                        seen.insert((s.groups, s.rounds.min(3), s.members.min(2), k.slots, k.partial))
                    })
                });
                assert_eq!(shared.is_empty(), grid == (1, 1), "{grid:?}");
                for (plan, got) in shared {
                    assert!(got == *want, "{grid:?} {epilogue:?} {plan:?}");
                }
            }
        }
    }

    /// Long inputs in two parts, with a residual and without, alone and shared: what the host computes, and the same bits on
    /// every grid.
    #[test]
    fn long_inputs_are_multiplied_in_parts() {
        let (rows, inputs, outputs) = (40, 256 * 32, 96);
        let x: Vec<f32> = values(rows * inputs, 6).iter().map(|v| (v * 63.0).round() / 64.0).collect();
        let (w, r) = (values(outputs * inputs, 7), values(rows * outputs, 8));
        let stored: Vec<f64> =
            w.iter().map(|&v| f64::from(crate::layout::bf16_value(crate::layout::bf16_bits(v)))).collect();
        let want = |residual: bool| -> Vec<f32> {
            let product = |at: usize| {
                let (row, out) = (at / outputs, at % outputs);
                let of = |i: usize| f64::from(x[row * inputs + i]) * stored[out * inputs + i];
                (0..inputs).map(of).sum::<f64>() + if residual { f64::from(r[at]) } else { 0.0 }
            };
            (0..rows * outputs).map(|at| product(at) as f32).collect()
        };
        let weight = TensorSource::from_f32("w", vec![outputs, inputs], &w).unwrap();
        let parts = vec![LinearPart { weight, bias: None, columns: None }];
        let source = WeightSource::Linear { parts, exact: false };
        let mut first: [Option<Vec<f32>>; 2] = Default::default();
        for grid in [(8, 10), (3, 2), (1, 1)] {
            let Some(d) = open(grid, false) else { return };
            let (x, weight) = (d.upload(rows, inputs, &x).unwrap(), d.prepare(&source).unwrap());
            let residual = d.upload(rows, outputs, &r).unwrap();
            for (with, first) in [false, true].into_iter().zip(&mut first) {
                let call = Dense { residual: with.then_some(&residual), ..Dense::new(&x, &weight) };
                let got = d.download(&dense(&d, &call).unwrap()).unwrap().data;
                let agreement = pi0_device::compare(&got, &want(with));
                assert!(agreement.relative_l2 < 2e-4, "{grid:?} {with}: {agreement}");
                assert!(*first.get_or_insert_with(|| got.clone()) == got, "{grid:?} {with}");
            }
        }
    }

    /// The counters by which cores say that they are ready are as they were, whoever was first.
    #[test]
    fn a_thousand_shared_layers_leave_nothing_behind() {
        for lists in [false, true] {
            let Some(d) = open((2, 2), lists) else { return };
            let layer = Layer::new(&d);
            let mut left = 1;
            let pick = |p: &LinearPlan| p.spread.is_some_and(|s| s.members == 3 && s.rounds == 2);
            let picked = layer.compute(&d, Epilogue::None, |p| pick(p) && std::mem::take(&mut left) == 1);
            let [(plan, want)] = &picked[..] else { panic!("{picked:?}") };
            let WeightKind::Linear(w) = &layer.weight.kind else { panic!("not linear") };
            let y = d.tensor(layer.x.rows, w.outputs).unwrap();
            let p = Product { x: &layer.x, w, residual: None, epilogue: Epilogue::None, parts: 1, y: &y };
            let before = d.stats();
            for _ in 0..500 {
                d.multiply(&p, plan).unwrap();
            }
            assert!(d.download(&y).unwrap().data == *want);
            let after = d.stats();
            assert_eq!((after.shared - before.shared, after.kernels), (500, before.kernels));
            assert_eq!(after.dram_used, before.dram_used);
        }
    }

    /// Weights as bfp8 are multiplied as they are stored, in every way: activations of seven bits lose nothing, so the sums
    /// are those of the host, as far as the matrix unit adds exactly.
    #[test]
    fn block_floats_are_multiplied_as_they_are_stored() {
        let options = TensixOptions { grid: Some((4, 3)), bfp8: true, ..Default::default() };
        let Some(d) = open_with(options) else { return };
        let (rows, inputs, outputs) = (100, 150, 384);
        let x: Vec<f32> = values(rows * inputs, 5).iter().map(|v| (v * 63.0).round() / 64.0).collect();
        let (w, b) = (values(outputs * inputs, 1), values(outputs, 2));
        // 16 outputs of an input share an exponent.
        let mut stored = w.clone();
        for i in 0..inputs {
            for o in (0..outputs).step_by(SHARED) {
                let (exponent, bytes) = to_bfp8(&std::array::from_fn(|n| w[(o + n) * inputs + i])).unwrap();
                for (n, byte) in bytes.into_iter().enumerate() {
                    stored[(o + n) * inputs + i] = bfp8_value(exponent, byte);
                }
            }
        }
        assert!(stored.iter().zip(&w).any(|(a, b)| a != b));
        let product = |r: usize, o: usize| {
            let of = |i: usize| f64::from(x[r * inputs + i]) * f64::from(stored[o * inputs + i]);
            f64::from(b[o]) + (0..inputs).map(of).sum::<f64>()
        };
        let want: Vec<f32> =
            (0..rows * outputs).map(|at| product(at / outputs, at % outputs) as f32).collect();
        let weight = d.prepare(&linear(outputs, inputs)).unwrap();
        let WeightKind::Linear(w) = &weight.kind else { panic!("not linear") };
        assert_eq!(w.format, Format::Bfp8);
        let tiles = crate::layout::to_tiles(&x, rows, inputs, Format::Bf16);
        let region = d.region(&tiles, Format::Bf16).unwrap();
        let x = Tensor { format: Format::Bf16, ..Tensor::whole(region, rows, inputs) };
        let y = d.tensor(rows, outputs).unwrap();
        let p = Product { x: &x, w, residual: None, epilogue: Epilogue::None, parts: 1, y: &y };
        let like = Matmul::smallest([x.format, w.format], w.bias, p.epilogue, y.format, d.banks);
        let machine = Machine::on_grid(d.grid());
        let all = perf::candidates(&machine, p.shape(), like, d.l1_room(), l1::ARG_WORDS - 64);
        let mut seen = HashSet::new();
        for plan in all {
            let k = &plan.kernel;
            if !seen.insert((k.rows, k.cols, k.partial, k.shared)) {
                continue;
            }
            d.multiply(&p, &plan).unwrap();
            let got = d.download(&y).unwrap().data;
            let agreement = pi0_device::compare(&got, &want);
            assert!(agreement.relative_l2 < 2e-4, "{plan:?}: {agreement}");
        }
        assert!(seen.len() > 9, "{seen:?}");
    }
}

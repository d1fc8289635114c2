//! What a wrapper of a device leaves to the device inside, in one line instead of one method each.

/// Inside an `impl Device`: these methods are those of the device inside.
///
/// ```
/// use pi0_device::{Device, Dense, Qkv, Result};
///
/// /// Runs on `D`, but fuses nothing.
/// struct Plain<D>(D);
///
/// impl<D: Device> Device for Plain<D> {
///     type Tensor = D::Tensor;
///     type Weight = D::Weight;
///
///     pi0_device::forward! { D.0:
///         name memory preferred shape on_host lacks tap enter exit upload download prepare
///         embed linear layer_norm rms_norm ada_rms_norm rope attention gelu silu geglu add add_scaled gated_add
///         concat_rows slice_rows slice_cols
///     }
/// }
/// ```
///
/// `D: …` without a field forwards to what `self` points to.
#[macro_export]
macro_rules! forward {
    ($device:ident . $field:tt : $($method:ident)*) => {
        $( $crate::forward! { @$method $device [.$field] } )*
    };
    ($device:ident : $($method:ident)*) => {
        $( $crate::forward! { @$method $device [] } )*
    };

    // One method, given its signature.
    (@fn $device:ident [$($field:tt)*] $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?) => {
        fn $name(&self, $($arg: $type),*) $(-> $result)? {
            $device::$name(&self $($field)*, $($arg),*)
        }
    };

    (@name $($to:tt)*) => { $crate::forward! { @fn $($to)* name() -> &'static str } };
    (@memory $($to:tt)*) => { $crate::forward! { @fn $($to)* memory() -> Option<$crate::MemoryMeter> } };
    (@preferred $($to:tt)*) => { $crate::forward! { @fn $($to)* preferred() -> $crate::Preferred } };
    (@shape $($to:tt)*) => { $crate::forward! { @fn $($to)* shape(x: &Self::Tensor) -> [usize; 2] } };
    (@on_host $($to:tt)*) => { $crate::forward! { @fn $($to)* on_host(op: $crate::OpKind) -> bool } };
    (@lacks $($to:tt)*) => { $crate::forward! { @fn $($to)* lacks(op: $crate::OpKind) -> $crate::Error } };
    (@tap $($to:tt)*) => { $crate::forward! { @fn $($to)* tap(name: &str, x: &Self::Tensor) } };
    (@enter $($to:tt)*) => { $crate::forward! { @fn $($to)* enter(module: ::std::fmt::Arguments<'_>) } };
    (@exit $($to:tt)*) => { $crate::forward! { @fn $($to)* exit() } };

    (@upload $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            upload(rows: usize, cols: usize, data: &[f32]) -> $crate::Result<Self::Tensor> }
    };
    (@download $($to:tt)*) => {
        $crate::forward! { @fn $($to)* download(x: &Self::Tensor) -> $crate::Result<$crate::HostTensor> }
    };
    (@largest $($to:tt)*) => {
        $crate::forward! { @fn $($to)* largest(x: &Self::Tensor) -> $crate::Result<Vec<$crate::Largest>> }
    };
    (@prepare $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            prepare(source: &$crate::WeightSource) -> $crate::Result<Self::Weight> }
    };

    (@embed $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            embed(table: &Self::Weight, ids: &[u32], scale: f32) -> $crate::Result<Self::Tensor> }
    };
    (@linear $($to:tt)*) => { $crate::forward! { @weighted $($to)* linear } };
    (@layer_norm $($to:tt)*) => { $crate::forward! { @weighted $($to)* layer_norm } };
    (@rms_norm $($to:tt)*) => { $crate::forward! { @weighted $($to)* rms_norm } };
    (@ada_rms_norm $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            ada_rms_norm(x: &Self::Tensor, by: &$crate::Modulation<'_, Self::Tensor>)
                -> $crate::Result<Self::Tensor> }
    };
    (@weighted $($to:tt)*) => {
        $crate::forward! { @fn $($to)* (x: &Self::Tensor, weight: &Self::Weight) -> $crate::Result<Self::Tensor> }
    };
    (@rope $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            rope(x: &Self::Tensor, positions: &[u32], head_dim: usize) -> $crate::Result<Self::Tensor> }
    };
    (@attention $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            attention(
                q: &Self::Tensor,
                kv: &[$crate::KeyValue<'_, Self::Tensor>],
                spec: &$crate::Attention<'_>
            ) -> $crate::Result<Self::Tensor> }
    };
    (@gelu $($to:tt)*) => { $crate::forward! { @each $($to)* gelu } };
    (@silu $($to:tt)*) => { $crate::forward! { @each $($to)* silu } };
    (@geglu $($to:tt)*) => { $crate::forward! { @each $($to)* geglu } };
    (@each $($to:tt)*) => {
        $crate::forward! { @fn $($to)* (x: &Self::Tensor) -> $crate::Result<Self::Tensor> }
    };
    (@add $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            add(x: &Self::Tensor, y: &Self::Tensor) -> $crate::Result<Self::Tensor> }
    };
    (@add_scaled $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            add_scaled(x: &Self::Tensor, y: &Self::Tensor, scale: f32) -> $crate::Result<Self::Tensor> }
    };
    (@gated_add $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            gated_add(x: &Self::Tensor, y: &Self::Tensor, by: &$crate::Modulation<'_, Self::Tensor>)
                -> $crate::Result<Self::Tensor> }
    };
    (@concat_rows $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            concat_rows(parts: &[&Self::Tensor]) -> $crate::Result<Self::Tensor> }
    };
    (@slice_rows $($to:tt)*) => { $crate::forward! { @slice $($to)* slice_rows } };
    (@slice_cols $($to:tt)*) => { $crate::forward! { @slice $($to)* slice_cols } };
    (@slice $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            (x: &Self::Tensor, range: ::std::ops::Range<usize>) -> $crate::Result<Self::Tensor> }
    };

    (@dense $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            dense(call: &$crate::Dense<'_, Self::Tensor, Self::Weight>) -> $crate::Result<Self::Tensor> }
    };
    (@store_rows $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            store_rows(to: &mut Self::Tensor, at: &[u32], x: &Self::Tensor) -> $crate::Result<()> }
    };
    (@qkv $($to:tt)*) => {
        $crate::forward! { @fn $($to)*
            qkv(call: &$crate::Qkv<'_, Self::Tensor, Self::Weight>) -> $crate::Result<[Self::Tensor; 3]> }
    };
}

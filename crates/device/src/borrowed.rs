//! A borrowed device is a device: wrappers such as [`Tapped`](crate::Tapped) can listen to one that someone else owns.

use crate::{Device, forward};

impl<D: Device> Device for &D {
    type Tensor = D::Tensor;
    type Weight = D::Weight;

    forward! { D:
        name memory preferred shape on_host lacks tap enter exit upload download largest prepare
        embed linear layer_norm rms_norm ada_rms_norm rope attention gelu silu geglu add add_scaled gated_add
        concat_rows slice_rows slice_cols dense qkv store_rows
    }
}

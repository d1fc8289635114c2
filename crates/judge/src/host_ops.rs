//! `--host-ops`: operations that are forced to the host.

use pi0_device::{Kind, OpKind};

use crate::Error;

/// What one name of the list means: a kind of operation, or one operation.
pub fn parse(name: &str) -> Result<Vec<OpKind>, String> {
    let kind = match name {
        "concat" => Some(Kind::Concatenation),
        "norm" => Some(Kind::Normalization),
        "elementwise" => Some(Kind::ElementWise),
        _ => Kind::ALL.into_iter().find(|k| k.name() == name),
    };
    if let Some(kind) = kind {
        return Ok(kind.ops());
    }
    let op = OpKind::BASE.into_iter().find(|op| op.name() == name);
    op.map(|op| vec![op]).ok_or_else(|| {
        let kinds = Kind::ALL.map(Kind::name).join(", ");
        let ops = OpKind::BASE.map(OpKind::name).join(", ");
        format!("{name} is neither a kind ({kinds}) nor an operation ({ops})")
    })
}

/// All that a list of names means.
pub fn parse_all(names: &[String]) -> crate::Result<Vec<OpKind>> {
    let one = |name: &String| parse(name).map_err(|why| Error::Option { option: "--host-ops".into(), why });
    Ok(names.iter().map(one).collect::<crate::Result<Vec<_>>>()?.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_aliases_and_operations() {
        assert_eq!(parse("linear").unwrap(), [OpKind::Linear]);
        assert_eq!(parse("concat").unwrap(), [OpKind::ConcatRows]);
        assert_eq!(parse("norm").unwrap(), [OpKind::LayerNorm, OpKind::RmsNorm, OpKind::AdaRmsNorm]);
        assert_eq!(parse("rope").unwrap(), [OpKind::Rope]);
        assert!(parse("conv").unwrap_err().contains("element-wise"));
    }
}

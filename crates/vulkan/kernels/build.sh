#!/usr/bin/env bash
# build.sh [OUT]: compiles the kernels to SPIR-V, into kernels/spv (or OUT). The compiler is $SLANGC, or slangc of the
# Vulkan SDK on PATH; tools/get-slangc.sh makes one from a PyPI wheel. What it writes is committed: a build of the crate
# needs none of this. The version is part of the result, since another one may order instructions differently.
set -euo pipefail
cd "$(dirname "$0")"
out=$(realpath -m "${1:-spv}")
slangc=${SLANGC:-slangc}
mkdir -p "$out"
kernel() { # NAME SOURCE DEFINES...
    local name=$1 source=$2; shift 2
    # Slang says that matrices raise the profile.
    "$slangc" "$source.slang" -warnings-disable 41012 -target spirv -profile spirv_1_5 "${@/#/-D}" -o "$out/$name.spv"
}
kernel gemm_64 gemm BN=64
kernel gemm_16 gemm BN=16
for bn in 64 16; do
    kernel matrix_${bn}_f16_8 matrix BN=$bn T=8 LANES=8 ELEMENT=half SCALED_ROWS=1
    kernel matrix_${bn}_f16_16 matrix BN=$bn T=16 LANES=32 ELEMENT=half SCALED_ROWS=1
    kernel matrix_${bn}_bf16_16 matrix BN=$bn T=16 LANES=32 ELEMENT=BFloat16 SCALED_ROWS=0
done
kernel norm norm
kernel pointwise pointwise
kernel embed embed
kernel rope rope
kernel attention_32 attention DT=32 DE=1
kernel attention_64 attention DT=64 DE=1
kernel attention_128 attention DT=128 DE=1
kernel attention_256 attention DT=128 DE=2
"$slangc" -v >"$out/COMPILER" 2>&1

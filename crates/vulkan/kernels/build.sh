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
    "$slangc" "$source.slang" -target spirv -profile spirv_1_5 "${@/#/-D}" -o "$out/$name.spv"
}
kernel gemm_64 gemm BN=64
kernel gemm_16 gemm BN=16
kernel norm norm
kernel pointwise pointwise
kernel embed embed
kernel rope rope
kernel attention_32 attention DT=32 DE=1
kernel attention_64 attention DT=64 DE=1
kernel attention_128 attention DT=128 DE=1
kernel attention_256 attention DT=128 DE=2
"$slangc" -v >"$out/COMPILER" 2>&1

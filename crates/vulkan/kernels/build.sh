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
    if [ "${TARGET:-spirv}" = cuda ]; then
        # CUDA has no such matrices.
        case $name in *_8 | *_s8_32) return ;; esac
        "$slangc" "$source.slang" -target cuda -profile sm_8_0 "${@/#/-D}" -o "$out/$name.cu"
        return
    fi
    # Slang says that matrices raise the profile.
    "$slangc" "$source.slang" -warnings-disable 41012 -target spirv -profile spirv_1_5 "${@/#/-D}" -o "$out/$name.spv"
}
kernel gemm_64 gemm BN=64
kernel gemm_16 gemm BN=16
half=(ELEMENT=half SUM=float SCALE=16 PAD=8)
bf16=(ELEMENT=BFloat16 SUM=float SCALE=0 PAD=8)
int8=(ELEMENT=int8_t SUM=int SCALE=8 PAD=16)
for bn in 64 16; do
    kernel dot_$bn dot BN=$bn
    kernel matrix_${bn}_f16_8 matrix BN=$bn T=8 DEPTH=8 LANES=8 "${half[@]}"
    kernel matrix_${bn}_f16_16 matrix BN=$bn T=16 DEPTH=16 LANES=32 "${half[@]}"
    kernel matrix_${bn}_bf16_16 matrix BN=$bn T=16 DEPTH=16 LANES=32 "${bf16[@]}"
    kernel matrix_${bn}_s8_8 matrix BN=$bn T=8 DEPTH=8 LANES=8 "${int8[@]}"
    kernel matrix_${bn}_s8_16 matrix BN=$bn T=16 DEPTH=16 LANES=32 "${int8[@]}"
    kernel matrix_${bn}_s8_32 matrix BN=$bn T=16 DEPTH=32 LANES=32 "${int8[@]}"
done
kernel norm norm
kernel pointwise pointwise
kernel embed embed
kernel largest largest
kernel rope rope
kernel attention_32 attention DT=32 DE=1
kernel attention_64 attention DT=64 DE=1
kernel attention_128 attention DT=128 DE=1
kernel attention_256 attention DT=128 DE=2
kernel attention_join attention_join
for head in 128 256; do
    kernel attention_${head}_f16_8 attention_matrix HEAD=$head T=8 LANES=8 ELEMENT=half
    kernel attention_${head}_f16_16 attention_matrix HEAD=$head T=16 LANES=32 ELEMENT=half
    kernel attention_${head}_bf16_16 attention_matrix HEAD=$head T=16 LANES=32 ELEMENT=BFloat16
done
"$slangc" -v >"$out/COMPILER" 2>&1

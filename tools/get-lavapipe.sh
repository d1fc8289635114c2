#!/usr/bin/env bash
# get-lavapipe.sh DIR [SUITE...]: Mesa's software Vulkan and the Khronos validation layer of another Debian release
# (forky, unless told otherwise), unpacked under DIR/root. x86-64 with apt; installs nothing and needs no root. The
# mirror is the one that this machine's apt uses. DIR/run PROGRAM ARGS... starts a program under that release's own loader
# and libraries; cargo takes it as a runner. EXTRA names further packages, such as spirv-tools.
set -euo pipefail
dir=$(realpath -m "$1"); shift
[ $# -gt 0 ] || set -- forky
if [ ! -x "$dir/run" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -v -- '-security' | sort -u | head -1)
    mkdir -p "$dir"/{etc/apt/preferences.d,state/lists/partial,cache/archives/partial,root}
    mkdir -p "$dir/dpkg"; : >"$dir/dpkg/status"
    for suite in "$@"; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
    done >"$dir/etc/apt/sources.list"
    options=(-qq -oDir::Etc="$dir/etc/apt" -oDir::Etc::sourcelist="$dir/etc/apt/sources.list"
        -oDir::Etc::sourceparts=/dev/null -oDir::State="$dir/state" -oDir::Cache="$dir/cache"
        -oDir::State::status="$dir/dpkg/status" -oAPT::Architecture=amd64 -oAPT::Architectures=amd64
        -oAPT::Install-Recommends=false -oAcquire::Languages=none -oAcquire::Retries=3)
    apt-get "${options[@]}" update
    apt-get "${options[@]}" -y -oDebug::NoLocking=1 --download-only -t "${*: -1}" install \
        mesa-vulkan-drivers libvulkan1 vulkan-validationlayers libgcc-s1 ${EXTRA:-} >/dev/null
    for package in "$dir"/cache/archives/*.deb; do dpkg -x "$package" "$dir/root"; done
    root=$dir/root
    printf '{"file_format_version":"1.0.1","ICD":{"library_path":"%s","api_version":"1.4.0"}}' \
        "$root/usr/lib/x86_64-linux-gnu/libvulkan_lvp.so" >"$dir/lavapipe.json"
    printf 'khronos_validation.%s = true\n' validate_sync syncval_shader_accesses_heuristic \
        syncval_full_validation >"$dir/vk_layer_settings.txt"
    (cd "$dir/cache/archives"; ls | grep -E '^(mesa-vul|libllvm|libc6_|vulkan-val|libvulkan1)') >"$dir/packages"
    cat >"$dir/run.new" <<RUN
#!/usr/bin/env bash
export VK_DRIVER_FILES=$dir/lavapipe.json VK_LAYER_PATH=$root/usr/share/vulkan/explicit_layer.d
export VK_LAYER_SETTINGS_PATH=$dir/vk_layer_settings.txt VK_LOADER_LAYERS_DISABLE='~implicit~'
exec \$(ls $root/{usr/,}lib64/ld-linux-x86-64.so.2 2>/dev/null | head -1) \\
    --library-path $root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu "\$@"
RUN
    chmod +x "$dir/run.new"
    mv "$dir/run.new" "$dir/run"
fi
cat "$dir/packages"

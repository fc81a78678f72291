#!/usr/bin/env bash
# Builds the images `berth` (static) and `berth-agent` (glibc 2.28 and later) for amd64 and arm64 as OCI layouts, without
# a container daemon, and looks into what it built. Usage:
#
#   tests/images/build.sh [FOLDER]   the images, default in target/images
#   tests/images/build.sh --check    whether the code compiles for arm64, and nothing else
#
# ARCHES="amd64 arm64" chooses architectures, TAG the tag. Tools that are missing are installed: zig and cargo-zigbuild
# (pip) and crane (go) into the tools' cache; mmdebstrap and qemu-user-static (apt) need root.
# Nothing is pushed anywhere: `crane push FOLDER/berth REGISTRY/berth:TAG` does that, and helm takes the digests printed.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly ZIG=0.17.1 ZIGBUILD=0.24.0 CRANE=v0.20.6 GLIBC=2.28
readonly OUT=${1:-target/images} ARCHES=${ARCHES:-amd64 arm64}
readonly TAG=${TAG:-$(sed -n 's/^appVersion: *"\?\([^"]*\)"\?$/\1/p' charts/berth/Chart.yaml)}
readonly TOOLS=${BERTH_TOOLS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/berth}/images
readonly RECIPE=tests/images/Containerfile

say() { printf '%s\n' "$*"; }
die() { printf 'images: %s\n' "$*" >&2; exit 1; }

# apt PACKAGE...: installs what the system lacks.
apt() {
  [ "$(id -u)" = 0 ] || die "as root: apt-get install $*"
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}

# A C compiler and linker for every target.
install_zig() {
  local venv=$TOOLS/zig-$ZIG-$ZIGBUILD
  mkdir -p "$TOOLS"
  if [ ! -x "$venv/bin/cargo-zigbuild" ]; then
    python3 -m venv "$venv" 2>/dev/null || { apt python3-venv && python3 -m venv "$venv"; }
    "$venv/bin/pip" -q install "ziglang==$ZIG" "cargo-zigbuild==$ZIGBUILD"
  fi
  export PATH="$venv/bin:$PATH"
}

install_tools() {
  install_zig
  [ -x "$TOOLS/crane-$CRANE/crane" ] ||
    GOBIN="$TOOLS/crane-$CRANE" go install "github.com/google/go-containerregistry/cmd/crane@$CRANE"
  export PATH="$TOOLS/crane-$CRANE:$PATH"
  { command -v mmdebstrap && command -v qemu-aarch64-static; } >/dev/null || apt mmdebstrap qemu-user-static
}

add_target() { rustup target add "$1" >/dev/null 2>&1 || die "rust's library for $1: rustup target add $1"; }

check() {
  install_zig
  add_target aarch64-unknown-linux-gnu
  cargo-zigbuild check --locked -p berth --target "aarch64-unknown-linux-gnu.$GLIBC"
}

machine() { case $1 in amd64) echo x86_64 ;; arm64) echo aarch64 ;; *) die "ARCHES: $1 is not amd64 or arm64" ;; esac; }

# build_binary ARCH static|dynamic: compiles and puts the binary into the build context.
build_binary() {
  local machine triple suffix=""
  machine=$(machine "$1")
  if [ "$2" = static ]; then triple=$machine-unknown-linux-musl; else triple=$machine-unknown-linux-gnu suffix=.$GLIBC; fi
  add_target "$triple"
  cargo-zigbuild zigbuild --release --locked -p berth --target "$triple$suffix"
  without_debug_info "${CARGO_TARGET_DIR:-target}/$triple/release/berth" "$OUT/context/$1/$2/berth"
}

# without_debug_info FROM TO: four fifths of a binary are line tables, which a node would pull for nothing; names of
# functions stay, for backtraces. Rust's own objcopy reads every architecture.
without_debug_info() {
  local sysroot
  sysroot=$(rustc --print sysroot)
  mkdir -p "$(dirname "$2")"
  LD_LIBRARY_PATH=$sysroot/lib "$sysroot"/lib/rustlib/*/bin/rust-objcopy --strip-debug "$1" "$2"
  chmod 755 "$2"
}

# instructions IMAGE WORD: what the recipe says after WORD in the stage of IMAGE.
instructions() {
  awk -v image="$1" -v word="$2" '
    $1 == "FROM" { inside = $NF == image }
    inside && $1 == word { sub(/^[A-Z]+ /, ""); print }' "$RECIPE"
}

# pack FOLDER TAR: the same files give the same bytes.
pack() { tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$1" -cf "$2" .; }

# build_image ARCH IMAGE REGISTRY: stages what the recipe copies, one layer, and pushes it to the local registry.
build_image() {
  local arch=$1 image=$2 to="$3/$2:$TAG-$1" root base=(--oci-empty-base) from dest
  root=$(mktemp -d -p "$OUT")
  while read -r from dest; do
    install -D -m "$(stat -c %a "$OUT/${from/\$\{TARGETARCH\}/$arch}")" "$OUT/${from/\$\{TARGETARCH\}/$arch}" "$root$dest"
  done < <(instructions "$image" COPY)
  pack "$root" "$OUT/layer.tar"
  rm -r "$root"
  if [ "$(instructions "$image" FROM)" != "scratch AS $image" ]; then
    # The C library and certificates, and nothing that runs.
    SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --variant=extract --architectures="$arch" \
      --include=libc6,libgcc-s1,ca-certificates bookworm "$OUT/base-$arch.tar"
    crane append --insecure --oci-empty-base -f "$OUT/base-$arch.tar" -t "$to-base" >/dev/null
    base=(-b "$to-base")
  fi
  crane append --insecure "${base[@]}" -f "$OUT/layer.tar" -t "$to" >/dev/null
  crane mutate --insecure "$to" -t "$to" --set-platform "linux/$arch" \
    --user "$(instructions "$image" USER)" --entrypoint "$(instructions "$image" ENTRYPOINT | tr -d '[]" ')" \
    --label "org.opencontainers.image.title=$image" --label "org.opencontainers.image.version=$TAG" \
    --label "org.opencontainers.image.licenses=Apache-2.0" >/dev/null
}

# check_image ARCH IMAGE REGISTRY: its program starts on its own files and says its version.
check_image() {
  local root version newest run=()
  root=$(mktemp -d)
  crane export --insecure "$3/$2:$TAG-$1" - | tar -x -C "$root" --no-same-owner
  [ "$1" = amd64 ] && [ "$(uname -m)" = x86_64 ] || run=("$(command -v "qemu-$(machine "$1")-static")" -L "$root")
  if [ "$2" = berth ]; then
    file_is_static "$root/usr/bin/berth" || die "$2 $1: its binary is not static"
  else
    newest=$(readelf -V "$root/usr/bin/berth" | grep -o 'GLIBC_[0-9.]*' | sort -V | tail -1)
    [ "$(printf '%s\n' "$newest" "GLIBC_$GLIBC" | sort -V | tail -1)" = "GLIBC_$GLIBC" ] ||
      die "$2 $1: it needs $newest, and hosts have $GLIBC"
  fi
  if [ ${#run[@]} -gt 0 ]; then
    version=$("${run[@]}" "$root/usr/bin/berth" --version)
  else
    version=$(chroot "$root" /usr/bin/berth --version)
  fi
  [ -n "$version" ] || die "$2 $1: its program says no version"
  say "  $2 $1: $version, $(find "$root" -type f | wc -l) files, $(du -sm "$root" | cut -f1) MB"
  rm -r "$root"
}

file_is_static() { ! readelf -l "$1" | grep -q 'Requesting program interpreter'; }

serve_registry() {
  local port
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  crane registry serve --address "127.0.0.1:$port" --disk "$OUT/registry" >"$OUT/registry.log" 2>&1 &
  REGISTRY_PID=$!
  trap 'kill "$REGISTRY_PID" 2>/dev/null || true' EXIT
  REGISTRY=127.0.0.1:$port
  for _ in $(seq 100); do
    crane catalog --insecure "$REGISTRY" >/dev/null 2>&1 && return
    sleep 0.1
  done
  die "the local registry does not start: see $OUT/registry.log"
}

main() {
  install_tools
  mkdir -p "$OUT/context" "$OUT/registry"
  install -m 644 LICENSE "$OUT/context/LICENSE"
  local arch image linkage
  for arch in $ARCHES; do
    for linkage in static dynamic; do build_binary "$arch" "$linkage"; done
  done
  serve_registry
  for image in berth berth-agent; do
    local manifests=()
    for arch in $ARCHES; do
      build_image "$arch" "$image" "$REGISTRY"
      manifests+=(-m "$REGISTRY/$image:$TAG-$arch")
    done
    crane index append --insecure "${manifests[@]}" -t "$REGISTRY/$image:$TAG" >/dev/null
    rm -rf "${OUT:?}/$image"
    crane pull --insecure --format oci "$REGISTRY/$image:$TAG" "$OUT/$image"
    say "$image:$TAG $(crane digest --insecure "$REGISTRY/$image:$TAG") in $OUT/$image"
    for arch in $ARCHES; do check_image "$arch" "$image" "$REGISTRY"; done
  done
}

if [ "$OUT" = --check ]; then check; else main; fi

#!/usr/bin/env bash
# The tests of values on 64-bit Arm, which QEMU emulates: some minutes, and 1 GB once.
#
#   tests/arm64.sh [WHAT PYTEST IS GIVEN...]     tests/test_values.py, if it is nothing
#
# On a Debian or Ubuntu, as root.  Nothing can start another process there.
set -euo pipefail
cd "$(dirname "$0")/.."
home=${FASTRELU_DEBIAN:-/var/cache/fastrelu-debian}/arm64
for program in debootstrap qemu-aarch64-static; do
  command -v $program >/dev/null || {
    apt-get update -qq && apt-get install -y -qq debootstrap qemu-user-static
  } >/dev/null
done
if [ ! -d "$home" ]; then
  rm -rf "$home.new" && mkdir -p "$home.new/wheels"
  debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libgomp1 \
    bookworm "$home.new" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$home.log" 2>&1 ||
    { tail -n 5 "$home.log" && exit 1; }
  # Installing them would take their own programs; files are enough.
  for package in "$home.new"/var/cache/apt/archives/*.deb; do
    dpkg -x "$package" "$home.new"
  done
  python3 -m pip download -q --dest "$home.new/wheels" --only-binary=:all: \
    --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 "numba>=0.62" "numpy>=2" ml_dtypes "pytest>=9" "hypothesis>=6.100"
  for wheel in "$home.new"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$home.new/packages"
  done
  mv "$home.new" "$home"
fi
[ $# != 0 ] || set -- tests/test_values.py
exec qemu-aarch64-static -L "$home" -E PYTHONPATH="$PWD:$home/packages" \
  -E NUMBA_CACHE_DIR="$home/cache" -E HOME=/tmp \
  "$home/usr/bin/python3" -m pytest -q -p no:cacheprovider "$@"

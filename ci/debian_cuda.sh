#!/usr/bin/env bash
# Unpacks the CUDA 12.4 compiler of Debian 13 (non-free) under DIR, laid out as NVIDIA's own, so that Debian 12 or 13 on
# x86_64 can build for drivers of CUDA 12. Installs nothing; downloads 1 GB, keeps 200 MB. ci/install_cuda.sh calls it.
#
#   ci/debian_cuda.sh DIR        then: CUDA_HOME=DIR
set -euo pipefail

folder=$(realpath -m "${1:?usage: ci/debian_cuda.sh DIR}")
[ -x "$folder/bin/nvcc" ] && exit 0
[ "$(dpkg --print-architecture)" = amd64 ] || { echo "this unpacks an x86_64 compiler, on Debian x86_64 alone" >&2; exit 1; }

# shellcheck disable=SC2016  # apt's own variable
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | awk '/\/debian\/$/ && !found { print; found = 1 }')
[ -n "$mirror" ] || { echo "apt knows no Debian mirror here; run apt-get update" >&2; exit 1; }
mkdir -p "$folder"
scratch=$(mktemp -d -p "$folder") # the packages are too large for some /tmp
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/{lists/partial,cache/archives/partial,debs,root}
key=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$key] $mirror trixie main contrib non-free" > "$scratch/sources.list"
apt=(apt-get -q -o Dir::Etc::sourcelist="$scratch/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$scratch/lists"
    -o Dir::Cache="$scratch/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root)
"${apt[@]}" update
cd "$scratch/debs"
"${apt[@]}" download nvidia-cuda-toolkit nvidia-cuda-dev libnvvm4 libcu++-dev libcub-dev libthrust-dev
leave=() # the math libraries, above all
for name in '*.so' 'libcu[bfs]*.a' 'libcurand*' 'libnpp*' 'libnv[jr]*.a' ./usr/share '*/compute-sanitizer'; do
    leave+=(--exclude "$name")
done
for package in *.deb; do dpkg-deb --fsys-tarfile "$package" | tar -x -C "$scratch/root" "${leave[@]}"; done

toolkit=$scratch/root/usr/lib/nvidia-cuda-toolkit
mkdir -p "$folder"/{bin,lib64,nvvm}
for tool in ptxas fatbinary nvlink cudafe++ bin2c; do mv "$scratch/root/usr/bin/$tool" "$folder/bin/"; done
mv "$toolkit"/bin/{nvcc,cicc,crt} "$folder/bin/"
mv "$toolkit/libdevice" "$folder/nvvm/"
mv "$scratch/root/usr/include" "$folder/"
mv "$scratch"/root/usr/lib/x86_64-linux-gnu/lib{cudart_static.a,cudadevrt.a,nvvm.so.4*} "$folder/lib64/"
cat > "$folder/bin/nvcc.profile" <<'END'
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(_HERE_):
LD_LIBRARY_PATH += $(TOP)/lib64:
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
END

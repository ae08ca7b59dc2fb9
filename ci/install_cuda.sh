#!/usr/bin/env bash
# Installs what csrc/build.py needs of one CUDA version: nvcc, the headers and the static runtime; no driver, no math library.
#
#   ci/install_cuda.sh 13.0           in the manylinux_2_28 image (AlmaLinux 8, x86_64 or aarch64), from NVIDIA's repository,
#                                     to /usr/local/cuda-13.0; also the newest gcc that every CUDA from 12.4 on takes
#   ci/install_cuda.sh 13.0 ~/cuda    elsewhere, from PyPI, into a folder; PyPI has nvcc from CUDA 13.0 on
#   ci/install_cuda.sh 12.4 ~/cuda    on Debian, from Debian: ci/debian_cuda.sh
#
# Prints the folder for CUDA_HOME last. Ends with an error unless what it installed is that version and compiles a kernel.
set -euo pipefail

usage="usage: ci/install_cuda.sh VERSION [FOLDER], such as 13.0"
version=${1:?$usage}
[[ $version =~ ^[0-9]+\.[0-9]+$ ]] || { echo "$usage; got $version" >&2; exit 2; }
folder=${2:-/usr/local/cuda-$version}

from_nvidia() {
    local repository dashed=${version/./-}
    case $(uname -m) in
        x86_64) repository=x86_64 ;;
        aarch64) repository=sbsa ;;
        *) echo "NVIDIA has no toolkit for $(uname -m)" >&2; exit 1 ;;
    esac
    if [ $# -gt 0 ]; then
        echo "dnf installs to /usr/local/cuda-$version; leave $1 out" >&2
        exit 2
    fi
    curl -fsSL --retry 5 -o /etc/yum.repos.d/cuda-rhel8.repo \
        "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$repository/cuda-rhel8.repo"
    # The image's own gcc is too new for CUDA 12.6 and older, which stop at gcc 13.
    dnf -y -q --setopt=install_weak_deps=False --setopt=retries=10 install gcc-toolset-13-gcc-c++ \
        "cuda-nvcc-$dashed" "cuda-cudart-devel-$dashed" "cuda-cccl-$dashed"
    dnf -q clean all
    ln -sfn "$folder" /usr/local/cuda
    export CXX=${CXX:-/opt/rh/gcc-toolset-13/root/usr/bin/g++}
}

from_pypi() {
    local part packages=()
    if [ "${version%%.*}" -lt 13 ]; then
        echo "PyPI has nvcc from CUDA 13.0 on, Debian 12.4. $version: https://developer.nvidia.com/cuda-toolkit-archive" >&2
        exit 1
    fi
    for part in cuda-nvcc cuda-crt nvvm cuda-runtime cuda-cccl; do packages+=("nvidia-$part==$version.*"); done
    "${PYTHON:-python3}" -m pip install -q --disable-pip-version-check --no-deps --upgrade --target "$folder" "${packages[@]}"
    folder=$(realpath "$folder/nvidia/cu${version%%.*}")
    ln -sfn lib "$folder/lib64"
}

if command -v dnf > /dev/null; then
    from_nvidia "${@:2}"
elif [ "$version" = 12.4 ] && command -v apt-get > /dev/null; then
    "$(dirname "${BASH_SOURCE[0]}")/debian_cuda.sh" "$folder"
else
    from_pypi
fi

found=$("$folder/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
[ "$found" = "$version" ] || { echo "$folder is CUDA $found, not $version" >&2; exit 1; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cat > "$scratch/kernel.cu" <<'END'
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
__global__ void twice(__nv_bfloat16* x) { x[threadIdx.x] = __hadd(x[threadIdx.x], x[threadIdx.x]); }
int launch(__nv_bfloat16* x) { twice<<<1, 32>>>(x); return static_cast<int>(cudaGetLastError()); }
END
flags=(-std=c++17 -arch=sm_90a -Xcompiler=-fPIC -shared -cudart=static ${CXX:+-ccbin="$CXX"})
if ! "$folder/bin/nvcc" "${flags[@]}" -o "$scratch/kernel.so" "$scratch/kernel.cu"; then
    echo "$folder/bin/nvcc does not compile and link a kernel with ${CXX:-the g++ on PATH}" >&2
    exit 1
fi
echo "$folder"

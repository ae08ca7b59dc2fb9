#!/usr/bin/env bash
# Unpacks the compiler and C library of Debian 11 (gcc 10, glibc 2.31) under DIR, so that a newer Debian on x86_64 can
# link libraries that run on manylinux_2_28. Installs nothing; takes the packages from the mirror that apt uses here.
#
#   ci/old_sysroot.sh DIR        then: CXX=DIR/g++ ci/build_wheel.sh cu130 all
set -euo pipefail

folder=$(realpath -m "${1:?usage: ci/old_sysroot.sh DIR}")
root=$folder/root
[ -x "$folder/g++" ] && exit 0
[ "$(dpkg --print-architecture)" = amd64 ] || { echo "this makes an x86_64 compiler, on Debian x86_64 alone" >&2; exit 1; }

mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep '/debian/$' | head -1)
[ -n "$mirror" ] || { echo "apt knows no Debian mirror here; run apt-get update" >&2; exit 1; }
mkdir -p "$folder"/{lists/partial,cache/archives/partial,debs} "$root"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bullseye main" > "$folder/sources.list"
apt=(apt-get -q -o Dir::Etc::sourcelist="$folder/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$folder/lists"
    -o Dir::Cache="$folder/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root)
"${apt[@]}" update
cd "$folder/debs"
"${apt[@]}" download gcc-10 g++-10 cpp-10 libgcc-10-dev libstdc++-10-dev libstdc++6 libgcc-s1 libc6 libc6-dev \
    linux-libc-dev libcrypt1 libcrypt-dev libisl23 libmpc3 libmpfr6 libgmp10
for package in *.deb; do dpkg -x "$package" "$root"; done

# Links that are absolute would leave the sysroot.
find "$root" -type l -lname '/*' -print0 | while IFS= read -r -d '' link; do
    ln -sfr "$root$(readlink "$link")" "$link"
done
# What cc1plus itself loads, apart from the old libc, which the machine's own programs must not see.
mkdir -p "$folder/compiler-libraries"
cp -P "$root"/usr/lib/x86_64-linux-gnu/lib{isl,mpc,mpfr,gmp}.so.* "$folder/compiler-libraries/"

# manylinux_2_28 has the libstdc++ of gcc 8. What gcc 10's headers use beyond it is linked from the static library: the
# string streams, whose default constructors became functions of the shared one in gcc 9. The rest stays shared.
(cd "$folder" && ar x "$("$root/usr/bin/g++-10" --sysroot="$root" -print-file-name=libstdc++.a)" sstream-inst.o &&
    ar rcsD libnewer.a sstream-inst.o)

cat > "$folder/g++" <<EOF
#!/bin/sh
export LD_LIBRARY_PATH="$folder/compiler-libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
case " \$* " in *" -c "* | *" -E "* | *" -S "* | *" -M"*) ;; *) set -- "\$@" "$folder/libnewer.a" ;; esac
exec "$root/usr/bin/g++-10" --sysroot="$root" "\$@"
EOF
chmod +x "$folder/g++"
echo "$folder/g++"

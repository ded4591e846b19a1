# Process 1 of the cluster's namespaces. The tests run it with bash in new mount, network and process namespaces.
set -eu
state=$1

# Nothing that is mounted from here on is seen outside, and the last process to end takes it along.
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs /run
mount --bind "$state/lib" /var/lib
mount --bind "$state/varlog" /var/log
mount -t proc proc /proc

# The kubelet wants these kernel settings and would set them for the whole machine. It finds them set already.
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  name=${setting%=*}
  [ -e "/proc/sys/$name" ] || continue
  file=$state/settings/${name//\//.}
  echo "${setting#*=}" >"$file"
  mount --bind "$file" "/proc/sys/$name"
done

# These belong to the network namespace.
echo 1 >/proc/sys/net/ipv4/ip_forward
for name in net/bridge/bridge-nf-call-iptables net/bridge/bridge-nf-call-ip6tables; do
  [ ! -e "/proc/sys/$name" ] || echo 1 >"/proc/sys/$name" || true
done
ip link set lo up

# The kubelet shares mounts with pods that ask for it.
mount --make-rshared /
echo ready >"$state/init.ready"

# Waiting collects the orphans that end up here.
while :; do
  sleep 1000000 &
  wait "$!" || true
done

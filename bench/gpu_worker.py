"""The process that works on the GPU: it answers requests on stdin, a line of JSON each.

An access out of bounds ends all work of a process on the GPU.  So the process that
asks has another one, and starts it again where it must.
"""

import dataclasses
import json
import os
import sys

import gpu_checks
import gpu_device
import gpu_peers
from gpu_device import version

from fastrelu.cli.peers.cases import Case, dtype_of


class Worker:
    """What can be asked; a method a request."""

    def __init__(self, device, libraries, absent):
        self.device, self.libraries, self.absent = device, libraries, absent
        self.limits = {}

    @property
    def owner(self):
        """The library whose arrays are measured."""
        if not self.libraries:
            msg = "neither CuPy nor PyTorch sees a GPU"
            raise RuntimeError(msg)
        return next(iter(self.libraries.values()))

    def about(self):
        """Return the device's words, versions, who takes part, and who does not."""
        peers, absent = [], dict(self.absent)
        versions = {"python": sys.version.split()[0]}
        for package in (
            "fastrelu",
            "numba-cuda",
            "cuda-core",
            "numpy",
            *self.libraries,
        ):
            versions[package] = version(package)
        for name, peer in gpu_peers.PEERS.items():
            reasons = [self.absent[m] for m in peer.modules if m in self.absent]
            if reason := gpu_peers.missing(peer) or "".join(reasons[:1]):
                absent[name] = reason
            else:
                peers.append(name)
                versions.setdefault(peer.modules[0], version(peer.modules[0]))
        return {
            "device": self.device.about(),
            "versions": versions,
            "peers": peers,
            "absent": absent,
            "checks": list(gpu_checks.checks(self.libraries)),
            "library": self.owner.name,
        }

    def check(self, name):
        function, library = gpu_checks.checks(self.libraries)[name]
        try:
            function(self.device, self.libraries[library])
            self.device.synchronize()
        except gpu_checks.Skip as reason:
            return {"verdict": "skipped", "why": str(reason)}
        except AssertionError as error:
            return {"verdict": "failed", "why": gpu_checks.told(error)}
        return {"verdict": "ok", "why": ""}

    def measure(self, name, names, turns):
        """Return the times of a case for these peers, and how fast the device copies."""
        case = Case.parse(name)
        peers = {peer: gpu_peers.PEERS[peer](self.owner) for peer in names}
        for library in self.libraries.values():
            library.release()
        size = case.n * dtype_of(case.dtype).itemsize
        results, self.limits[size] = gpu_peers.measure(
            self.device, peers, case, self.limits.get(size), turns
        )
        fields = {}
        for result in results.values():
            fields[result.peer] = dataclasses.asdict(result)
            del fields[result.peer]["case"]
        return {"results": fields, "limit": self.limits[size]}

    def host(self, name, names):
        """Return what a call takes on the host, for us on each library's arrays."""
        case = Case.parse(name)
        peers = {peer: gpu_peers.PEERS[peer](self.owner) for peer in names}
        del peers["fastrelu"]
        ours = {"cupy": gpu_peers.FastReluCuPy, "torch": gpu_peers.FastReluTorch}
        for library in self.libraries.values():
            peer = ours[library.name](library)
            peers[peer.name] = peer
        found, errors = {}, {}
        for peer in peers.values():
            if peer.lacks(case) or peer.from_host:
                continue
            try:
                found[peer.name] = gpu_peers.host_seconds(self.device, peer, case)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                errors[peer.name] = f"{type(error).__name__}: {error}"
        return {**found, "errors": errors}

    def first(self):
        """Return the seconds of the first call with an empty and with a full cache."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            calls = [
                gpu_checks.seconds_of(gpu_checks.first_call(self.owner.name, folder))
                for _ in range(4)
            ]
        return {"empty": calls[0], "warm": sorted(calls[1:])[1]}


def libraries():
    """Return the libraries that see a GPU, and why others do not."""
    found, absent = {}, {}
    for name, kind in gpu_device.LIBRARIES.items():
        try:
            library = kind()
            library.get(library.upload(gpu_checks.np.zeros(1, "u1")))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            absent[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            found[name] = library
    return found, absent


def serve(worker, lines=sys.stdin):
    """Answer the requests, a line of JSON each, until there are no more."""
    # What libraries print must not get between the answers: it goes with the errors.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        print(json.dumps({"version": ""}), file=answers)
        for line in lines:
            request, *arguments = json.loads(line)
            try:
                answer = getattr(worker, request)(*arguments)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                answer = {"error": gpu_checks.told(error)}
            print(json.dumps(answer), file=answers)


def configure(arguments):
    """Give the engine other constants, such as THREADS=256, before it makes kernels."""
    if arguments[:1] != ["--set"]:
        return
    from fastrelu.cuda import config, kernels

    for name, _, value in (setting.partition("=") for setting in arguments[1:]):
        for of, module in list(sys.modules.items()):
            if of.startswith("fastrelu.cuda") and hasattr(module, name):
                setattr(module, name, int(value))
    kernels.ACROSS = config.THREADS // config.DOWN


def main():
    configure(sys.argv[1:])
    found = libraries()
    serve(Worker(gpu_device.Device(), *found))


if __name__ == "__main__":
    main()

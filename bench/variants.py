"""This package under other settings, as peers of itself."""

from fastrelu.cli.peers.libraries import FastRelu


def variant(label, **settings):
    """Return fastrelu with more in its environment."""

    class Variant(FastRelu):
        name = label
        command = FastRelu.command

        @classmethod
        def environment(cls):
            return settings

    return Variant

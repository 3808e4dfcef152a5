"""The sampler as a file: machine code that starts at once, or StableHLO that runs without this package."""

"""The log-prob kernels; a package of its own, so that no other named `kernels` is found first."""

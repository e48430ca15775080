"""Hypothesis profiles: "ci" (default) is small and repeatable, "large" is run by hand.

HYPOTHESIS_PROFILE=large pytest -n auto tests/test_properties.py
"""

import os

# The workers of pytest-xdist are as many as the cores. A BLAS that starts as many threads again in
# each of them spends most of its time waiting; it reads these when NumPy or torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Eight CPU devices for JAX's shard_map; read when JAX starts.
_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{_DEVICES} {os.environ.get('XLA_FLAGS', '')}"

from hypothesis import HealthCheck, settings  # noqa: E402

# An example here is a whole problem: slow generation is the oracle's arrays, not a bad strategy.
settings.register_profile(
    "ci",
    max_examples=120,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "large",
    max_examples=2000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

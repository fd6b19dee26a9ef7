"""Every test and doctest starts from the same draws; PONDERA_TEST_SEED=1 (2, ...) gives others."""

import os
import random

import numpy as np
import pytest
import torch

SEED = int(os.environ.get("PONDERA_TEST_SEED", "0"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_setup(item):
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    yield


def pytest_collectstart(collector):
    torch.manual_seed(SEED)  # what a test module draws when it is imported
    np.random.seed(SEED)

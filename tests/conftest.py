"""Tiny random models and adapters for all tests; nothing is fetched from a network"""
import os
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import pytest, torch
from models import random_adapter, random_decoder
from lorasuite.training.finetune import init_adapter
from lorasuite.lab.zoo import new_tokenizer

torch.set_num_threads(1)

def pytest_configure(config):
    for noise in ('ignore::FutureWarning', 'ignore:Could not find a config file'):
        config.addinivalue_line('filterwarnings', noise)

@pytest.fixture(scope='session')
def tokenizer(): return new_tokenizer(512, seed=1)

@pytest.fixture(scope='session')
def decoder(tokenizer): return random_decoder(tokenizer)

@pytest.fixture(scope='session')
def adapter(decoder): return random_adapter(init_adapter(decoder, 4))

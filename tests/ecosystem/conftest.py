from importlib.util import find_spec

# Only the process that `test_transformers_suite.py` starts finds transformers' suite.
collect_ignore = [] if find_spec("transformers_suite") else ["transformers_suite_models.py"]

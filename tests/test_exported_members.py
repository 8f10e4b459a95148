"""What `import llmhub_meter` offers."""

import inspect

import llmhub_meter
from llmhub_meter import errors


def test_all_is_sorted_and_complete() -> None:
    exported = {
        name
        for name, member in vars(llmhub_meter).items()
        if not inspect.ismodule(member) and (not name.startswith("_") or name == "__version__")
    }
    assert llmhub_meter.__all__ == sorted(exported)


def test_every_error_is_exported() -> None:
    assert set(errors.__all__) <= set(llmhub_meter.__all__)
    defined = {
        name
        for name, member in vars(errors).items()
        if inspect.isclass(member) and issubclass(member, errors.MeterError) and not name.startswith("_")
    }
    assert set(errors.__all__) == defined

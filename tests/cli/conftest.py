from tests.export.conftest import saved

__all__ = ["saved"]

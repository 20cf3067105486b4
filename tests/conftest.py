"""Makes pytest put the root of the repository on the import path: `from tests.plain_style import ...`."""

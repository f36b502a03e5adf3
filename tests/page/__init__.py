"""A package, so that a fixture of its scope, the browser, is there for its tests and for no others."""

"""The command line: `guerdon train | resume | report | compare | methods | doctor`."""

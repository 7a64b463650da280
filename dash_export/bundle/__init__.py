"""The bundle: its layout, records, recipes and policy files; where it comes from and who signed it."""

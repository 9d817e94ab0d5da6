"""The claims of the source study, one file each."""

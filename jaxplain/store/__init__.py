"""The Zarr store: schema, writer, reader."""

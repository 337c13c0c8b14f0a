"""The ground of every floor: options, schemas, sealed files, processes, free memory."""

"""Documents that commands write and others read, as typed models."""

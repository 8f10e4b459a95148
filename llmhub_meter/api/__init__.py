"""What customers and operators read as JSON."""

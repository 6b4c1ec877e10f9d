"""Results for people: tables and pages."""

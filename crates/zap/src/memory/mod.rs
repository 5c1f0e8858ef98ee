//! Memory: layout, pages, dirty tracking, shared memory, vDSO.

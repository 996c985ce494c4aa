// Runs before the first paint, so that the page does not flash in the other theme.
(() => {
  try {
    const kept = localStorage.getItem("fairserve-theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch {
    // Storage is forbidden: the system's theme it is.
  }
})();

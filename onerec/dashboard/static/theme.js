// Runs before the page is painted, so that a remembered theme does not flash.
(() => {
  let stored = null;
  try { stored = localStorage.getItem("onerec-theme"); } catch { /* storage may be forbidden: the system's theme then */ }
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
})();

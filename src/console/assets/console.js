// What saves waiting, and nothing that a form can not do: copying a command, and the overview as it changes.
"use strict";
(() => {
  let source = null;

  const copying = (root) => {
    if (!navigator.clipboard) return;
    for (const button of root.querySelectorAll("button.copy")) {
      button.hidden = false;
      button.onclick = async () => {
        const text = button.parentElement.querySelector("code").textContent;
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      };
    }
  };

  const stop = () => {
    if (source) source.close();
    source = null;
  };

  // One connection, while the page is looked at: a browser has few for one host.
  const live = () => {
    const place = document.querySelector("[data-live]");
    const state = document.getElementById("live-state");
    if (!place || document.hidden) return stop();
    if (source && source.place === place) return;
    stop();
    source = new EventSource(place.dataset.live);
    source.place = place;
    const said = (text) => { if (state) { state.hidden = false; state.textContent = text; } };
    source.onmessage = (event) => {
      // The server's own markup, escaped there.
      place.innerHTML = event.data;
      said("live");
    };
    source.onerror = () => said("not live; trying again");
  };

  const begin = () => { copying(document); live(); };
  document.addEventListener("DOMContentLoaded", begin);
  document.addEventListener("visibilitychange", live);
  document.addEventListener("htmx:afterSettle", begin);
  window.addEventListener("pagehide", stop);
})();
